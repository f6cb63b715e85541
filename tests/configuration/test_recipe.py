"""Recipes: what is read is what was written, and what is malformed is refused by name."""

from __future__ import annotations

import pytest

from hf_gqaprune.configuration.recipe import Recipe, builtin_names
from hf_gqaprune.errors import UsageError

MINIMAL = "model: m\noutput: o\nprune: {ratio: 0.2}\n"


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize("name", builtin_names())
def test_built_in_recipes_load_and_round_trip(name, tmp_path):
    recipe = Recipe.load(name, ["model=some/model"])
    path = tmp_path / "copy.yaml"
    path.write_text(recipe.to_yaml())
    assert Recipe.load(path) == recipe


def test_overrides_are_typed_and_the_two_ratios_exclude_each_other(recipe_file):
    recipe = Recipe.load(recipe_file, ["prune.backbone_ratio=0.3", "seed=7", "recover=null", "evaluate.data=[a, b]"])
    assert (recipe.prune.ratio, recipe.prune.backbone_ratio, recipe.seed, recipe.recover) == (None, 0.3, 7, None)
    assert recipe.evaluate.data == ("a", "b")
    changes = ["prune.keep_layers=[0, -1]", "prune.round_to=32", "prune.attention_share=0"]
    prune = Recipe.load(recipe_file, changes).prune
    assert (prune.keep_layers, prune.round_to, prune.attention_share) == ((0, -1), 32, 0.0)
    changes = ["prune.allocation=layer_importance", "prune.temperature=2"]
    assert Recipe.load(recipe_file, changes).prune.temperature == 2.0
    assert Recipe.load(recipe_file, ["prune.keep_layers=2"]).prune.keep_layers == (2,)
    prune = Recipe.load(recipe_file, ["prune.rates=[0, 0.25]", "prune.min_kv_heads=0", "prune.min_ffn=64"]).prune
    assert (prune.ratio, prune.rates, prune.min_kv_heads, prune.min_ffn) == (None, (0.0, 0.25), 0, 64)


def test_recovery_takes_any_setting_beside_its_own_keys(recipe_file, tmp_path):
    recipe = Recipe.load(recipe_file, ["recover.rank=16", "recover.learning_rate=1e-4", "recover.preset=alpaca"])
    chosen = (recipe.recover.preset, recipe.recover.rank, recipe.recover.alpha, recipe.recover.learning_rate)
    assert chosen == ("alpaca", 16, 16, 1e-4)
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize(
    "override, said",
    [
        ("recover.rnak=16", "'recover.rnak' .did you mean 'recover.rank'"),
        ("recover.settings={rank: 16}", "unknown key .* 'recover.settings'"),
        ("prune.ratoi=0.2", "prune.ratio"),
        ("sed=1", "seed"),
        ("seed=one", "a whole number"),
        ("prune.ratio=high", "a number"),
        ("calibration=3", "must be a mapping"),
        ("prune.ratio", "KEY=VALUE"),
        ("prune.keep_layers=[0, last]", "prune.keep_layers=.* must be a list of whole numbers"),
        ("prune.keep_layers=[true]", "a list of whole numbers"),
        ("evaluate.data=[1]", "a list of texts"),
        ("prune.round_to=0", "a whole number from 1"),
        ("prune.rates=[0.1, some]", "prune.rates=.* must be a list of numbers"),
        ("prune.min_ffn=-1", "a whole number from 0"),
        ("prune.ratio=null", "exactly one .* none is set"),
        ("prune={ratio: 0.2, rates: [0.1]}", "exactly one .* not ratio and rates"),
    ],
)
def test_what_makes_no_sense_is_refused(recipe_file, override, said):
    with pytest.raises(UsageError, match=said):
        Recipe.load(recipe_file, [override])


def test_what_is_published_names_no_path(tmp_path):
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "model").mkdir()
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {tmp_path}/model\noutput: {tmp_path}/out\nprune: {{ratio: 0.2}}\n"
        f"calibration: {{data: [{tmp_path}/text.txt]}}\nrecover: {{data: [{tmp_path}/text.txt]}}\n"
    )
    assert str(tmp_path) not in Recipe.load(path).without_paths().to_yaml()
