"""Model cards: every figure comes from the folder's files, and the Hub accepts the metadata."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import pytest
from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_file
from support.hub_server import HubServer
from transformers import LlamaConfig

from hf_gqaprune.checkpoint import identity
from hf_gqaprune.errors import UsageError
from hf_gqaprune.model_cards.card import create_model_card, fill
from hf_gqaprune.plan import LayerPlan, PruningPlan

SHA256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
LLAMA_3_1_LICENSE = "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\nLlama 3.1 Version Release Date: July 23, 2024\n"


def perplexity(value: float, **changes: Any) -> dict[str, Any]:
    """What `report.json` says of one dataset and stage, at 1,000 tokens."""
    conditions = {"split": "test", "seq_len": 128, "stride": 127, "bos": True, "text_sha256": SHA256}
    return {"value": value, "nats": 1000 * math.log(value), "tokens": 1000, **conditions, **changes}


def write(folder: Path, report: dict[str, Any] | None = None, recipe: str | None = None) -> Path:
    """A pruned checkpoint's small files: 2 layers; layer 1 loses 2 of 4 KV groups and 12 of 48 FFN channels."""
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        dtype="float32",
    )
    plan = PruningPlan.keep_all(config)
    cut = LayerPlan.of_groups(plan.source.layers[1], (0, 3), range(36))
    plan = replace(plan, layers=(plan.layers[0], cut), criterion="taylor", allocation="global")
    folder.mkdir(parents=True, exist_ok=True)
    plan.save(folder / "prune_plan.json")
    auto_map = {"AutoModelForCausalLM": "modeling_pruned_llama.PrunedLlamaForCausalLM"}
    data = {"architectures": ["PrunedLlamaForCausalLM"], "model_type": "pruned_llama", "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(data))
    if report is not None:
        report = {"version": 1, "plan": plan.summary(), "seed": 7, "versions": {"torch": "2.13.0"}, **report}
        (folder / "report.json").write_text(json.dumps(report))
    if recipe is not None:
        (folder / "recipe.yaml").write_text(recipe)
    return folder


def stages(*values: float) -> list[dict[str, Any]]:
    names = ("dense", "pruned", "recovered")
    return [
        {"name": name, "parameters": 1, "trainable": None, "perplexity": {"wikitext2": perplexity(value)}}
        for name, value in zip(names, values, strict=False)
    ]


def card(folder: Path, **arguments: Any) -> ModelCard:
    arguments = {"base_model": "acme/Llama-mini", "license": "mit", **arguments}
    return ModelCard.load(create_model_card(folder, **arguments))


def test_whole_card(tmp_path: Path) -> None:
    """The example card in the package is what the code writes from the files in `tests/card`."""
    folder = Path(shutil.copytree(Path(__file__).parent / "card", tmp_path / "card"))
    arguments = json.loads((folder / "arguments.json").read_text())
    path = create_model_card(folder, **arguments)
    example = resources.files("hf_gqaprune.model_cards").joinpath("example.md").read_text(encoding="utf-8")
    assert path.read_text(encoding="utf-8") == example


def test_metadata_passes_the_hub_s_validation(hub: HubServer, tmp_path: Path) -> None:
    made = card(write(tmp_path / "mini-pruned", {"stages": stages(10.0, 12.5, 11.0)}))
    made.validate()
    data = made.data
    assert (data.base_model, data.base_model_relation, data.license) == ("acme/Llama-mini", "finetune", "mit")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert {"llama", "pruned", "grouped-query-attention", "custom_code"} <= set(data.tags)
    assert data.model_name == "mini-pruned"
    (result,) = data.eval_results
    assert (result.dataset_type, result.dataset_config) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert (result.dataset_split, result.metric_type, result.metric_value) == ("test", "perplexity", 11.0)
    assert type(result.metric_value) is float
    made.data.base_model = "/models/mini"
    with pytest.raises(ValueError, match="is not a model id"):
        made.validate()


def test_results_are_side_by_side_with_their_conditions(tmp_path: Path) -> None:
    text = card(write(tmp_path, {"stages": stages(10.0, 12.5, 11.0)})).text
    assert "| | dense | pruned | recovered | recovered / dense |" in text
    assert "| wikitext2 | 10.00 | 12.50 | 11.00 | 1.100 |" in text
    assert f"| wikitext2 | test | 128 | 127 | yes | 1,000 | `{SHA256}` |" in text


def test_sizes_are_those_of_the_plan(tmp_path: Path) -> None:
    text = card(write(tmp_path)).text
    # a layer: 2 norms of 32, attention 32 * 8 * (2 * 8 + 2 * 4), FFN 3 * 32 * 48; embeddings and head 2 * 100 * 32
    layer = 64 + 32 * 8 * 24 + 3 * 32 * 48
    # 2 KV groups of 2 query heads go: 32 * 8 * 12 parameters; 12 FFN channels: 3 * 32 * 12
    removed = 32 * 8 * 12 + 3 * 32 * 12
    before = 2 * layer + 6400 + 32
    assert f"| parameters | {before:,} | {before - removed:,} | {-100 * removed / before:+.2f} % |" in text
    assert f"| of the decoder layers | {2 * layer:,} | {2 * layer - removed:,} |" in text
    # 2 * KV heads * 8 * 4 bytes, of 4 + 4 heads and of 4 + 2
    assert "| KV cache, bytes per token | 512 | 384 | -25.00 % |" in text
    assert "| 0 | 4 | 8 | 48 |" in text
    assert "| 1 | 4 → 2 | 8 → 4 | 48 → 36 |" in text


def test_tasks_become_rows_and_results(tmp_path: Path) -> None:
    measured = stages(10.0, 12.5)
    for stage, accuracy in zip(measured, (0.75, 0.5), strict=True):
        stage["tasks"] = {"toy": {"acc,none": accuracy, "acc_stderr,none": 0.01, "alias": "toy"}}
    made = card(write(tmp_path, {"stages": measured}))
    assert "| toy | acc | 0.7500 | 0.5000 |" in made.text
    assert "stderr" not in made.content
    assert [(r.metric_type, r.metric_value) for r in made.data.eval_results] == [("perplexity", 12.5), ("acc", 0.5)]


def test_only_settings_that_differ_from_the_defaults_are_listed_and_the_recipe_is_verbatim(tmp_path: Path) -> None:
    recipe = "# ours\nmodel: acme/Llama-mini\noutput: out\nprune: {ratio: 0.2, criterion: wanda, min_ffn: 1}\n"
    made = card(write(tmp_path, recipe=recipe + "recover: {data: [acme/books, notes.txt], preset: default}\n"))
    assert "- `prune.ratio: 0.2`\n- `prune.criterion: wanda`\n- `recover.data: [acme/books, notes.txt]`\n" in made.text
    assert "`prune.min_ffn" not in made.text and "`recover.preset" not in made.text
    assert recipe in made.text
    assert made.data.datasets == ["acme/books"]


def test_without_report_and_recipe_the_card_says_that_nothing_was_measured(tmp_path: Path) -> None:
    made = card(write(tmp_path))
    assert "No perplexity was recorded" in made.text and "evaluate the model before use" in made.text
    assert made.data.eval_results is None and made.data.model_name is None
    assert "## Versions" not in made.text and "recipe.yaml" not in made.text


def test_calibration_and_recovery_are_described(tmp_path: Path) -> None:
    measured = stages(10.0, 12.5, 11.0)
    measured[2]["trainable"] = 12345
    calibration = [{"name": "wikitext2", "split": "train", "windows": 128}]
    text = card(write(tmp_path, {"stages": measured, "calibration": calibration})).text
    assert "- wikitext2 (split train, windows 128)" in text
    assert "Recovery trained 12,345 parameters" in text
    assert "allocation `global`, seed 7" in text


def training_log(**changes: Any) -> str:
    """What a recovery writes of itself, as far as a card reads it."""
    source = {"name": "wikitext2", "split": "train", "sha256": SHA256, "weight": 1.0, "rows": 40, "tokens": 1280}
    held_out = [{"step": 0, "loss": 2.0, "perplexity": 14.5}, {"step": 5, "loss": 1.0, "perplexity": 11.25}]
    log = {"teacher": "dense", "settings": {"method": "lora"}, "data": [source], "trainable": 12345, "tokens": 1280}
    return json.dumps({**log, "held_out": held_out, **changes})


def test_a_recovery_without_a_report_tells_what_was_trained_and_measured(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / "training_log.json").write_text(training_log())
    calibration = [{"name": "notes", "split": "file", "sha256": SHA256, "windows": 8, "weight": 1.0}]
    identity.write_identity(folder, calibration=calibration, seed=3, compensation="least_squares")
    made = card(folder)
    assert " % of the decoder layers'), then recovered by training." in made.text
    told = "Recovery trained 12,345 parameters on 1,280 tokens, distilled from `dense`, merged into the weights.\n\n"
    assert f"{told}Training text:\n\n- wikitext2 (split train, sha256 {SHA256}, rows 40, tokens 1280)\n" in made.text
    assert "perplexity was 14.50 before the training and 11.25 after it" in made.text
    assert "Only rows of the training text were evaluated" in made.text and "Nothing was evaluated" not in made.text
    assert "allocation `global`, seed 3; compensation `least_squares`." in made.text
    assert f"Calibration text:\n\n- notes (split file, sha256 {SHA256}, windows 8)\n" in made.text
    assert made.data.datasets == ["Salesforce/wikitext"]
    kept = {"step": 3, "loss": 1.0, "perplexity": 10.75}
    (folder / "training_log.json").write_text(training_log(kept=kept))
    assert "perplexity was 14.50 before the training and 10.75 after it" in card(folder, overwrite=True).text
    # all weights, by cross-entropy, without rows to measure
    changes = {"settings": {"method": "full"}, "teacher": None, "held_out": []}
    (folder / "training_log.json").write_text(training_log(**changes))
    text = card(folder, overwrite=True).text
    assert "Recovery trained 12,345 parameters on 1,280 tokens.\n" in text and "Nothing was evaluated" in text
    # a report says more
    write(folder, {"stages": stages(10.0, 12.5, 11.0)})
    text = card(folder, overwrite=True).text
    assert "recovered / dense" in text and "Only the results above were measured" in text and "seed 7;" in text
    (folder / "training_log.json").write_text("{")
    with pytest.raises(UsageError, match=r"training_log\.json is not JSON"):
        card(folder, overwrite=True)


def test_pictures_are_shown(tmp_path: Path) -> None:
    (write(tmp_path) / "report.png").touch()
    assert "\n![report](report.png)\n" in card(tmp_path).text


@pytest.mark.parametrize(
    ("architecture", "task", "auto_class"),
    [
        ("PrunedLlamaForSequenceClassification", "text-classification", "AutoModelForSequenceClassification"),
        ("PrunedLlamaForTokenClassification", "token-classification", "AutoModelForTokenClassification"),
        ("PrunedLlamaForQuestionAnswering", "question-answering", "AutoModelForQuestionAnswering"),
        ("PrunedLlamaModel", "feature-extraction", "AutoModel"),
    ],
)
def test_task_follows_the_model_class(tmp_path: Path, architecture: str, task: str, auto_class: str) -> None:
    folder = write(tmp_path)
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    made = card(folder)
    assert made.data.pipeline_tag == task
    assert f'{auto_class}.from_pretrained("{folder.name}")' in made.text
    # no auto_map, no remote code
    assert "custom_code" not in made.data.tags and "trust_remote_code" not in made.text


def test_a_local_base_is_named_without_its_path(tmp_path: Path) -> None:
    (base := tmp_path / "private" / "dense").mkdir(parents=True)
    made = card(write(tmp_path / "out"), base_model=base)
    assert "`dense` with " in made.text
    assert str(tmp_path) not in made.content and "private" not in made.content
    assert "base_model" not in made.data.to_dict()


def test_license_of_a_local_base_comes_from_its_card_then_its_license_file(tmp_path: Path) -> None:
    (base := tmp_path / "dense").mkdir()
    folder = write(tmp_path / "out")
    assert card(folder, base_model=base, license=None).data.license == "unknown"
    (base / "LICENSE").write_text("\n      Apache License\n      Version 2.0, January 2004\n")
    assert card(folder, base_model=base, license=None, overwrite=True).data.license == "apache-2.0"
    stated = {"license": "other", "license_name": "acme", "license_link": "https://acme.test/l", "language": "en"}
    (base / "README.md").write_text(f"---\n{ModelCardData(**stated).to_yaml()}\n---\n")
    data = card(folder, base_model=base, license=None, overwrite=True).data
    assert {key: data[key] for key in stated} == stated
    # what is said outright wins, and takes the other licence's name and link with it
    data = card(folder, base_model=base, license="mit", overwrite=True).data.to_dict()
    assert data["license"] == "mit" and not stated.keys() & data.keys() - {"license"}


def test_license_of_a_base_on_the_hub_comes_from_its_card(hub: HubServer, tmp_path: Path) -> None:
    create_repo("acme/Llama-mini")
    readme = b"---\nlicense: llama3.2\n---\n"
    upload_file(path_or_fileobj=readme, path_in_repo="README.md", repo_id="acme/Llama-mini")
    assert card(write(tmp_path), license=None).data.license == "llama3.2"
    assert card(write(tmp_path), base_model="acme/absent", license=None, overwrite=True).data.license == "unknown"


@pytest.mark.parametrize(
    ("license", "built_with", "notice"),
    [
        ("llama2", None, "Llama 2 is licensed under the LLAMA 2 Community License"),
        ("llama3", "**Built with Meta Llama 3**", "Meta Llama 3 is licensed under the Meta Llama 3 Community License"),
        ("llama3.3", "**Built with Llama**", "Llama 3.3 is licensed under the Llama 3.3 Community License"),
    ],
)
def test_a_llama_license_brings_its_notice(tmp_path: Path, license: str, built_with: str | None, notice: str) -> None:
    made = card(write(tmp_path), license=license)
    assert (tmp_path / "NOTICE").read_text(encoding="utf-8").startswith(notice)
    assert (built_with in made.text) if built_with else ("Built with" not in made.text)
    assert "acceptable use policy" in made.text


def test_a_llama_license_is_known_by_its_text(tmp_path: Path) -> None:
    (base := tmp_path / "dense").mkdir()
    (base / "LICENSE.txt").write_text(LLAMA_3_1_LICENSE)
    assert card(write(tmp_path / "out"), base_model=base, license=None).data.license == "llama3.1"
    assert (tmp_path / "out" / "NOTICE").exists()


def test_an_undefined_template_variable_raises() -> None:
    assert fill("{{ known }}", known=1) == "1"
    with pytest.raises(jinja2.UndefinedError, match="forgotten"):
        fill("{{ known }} {{ forgotten }}", known=1)


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder"):
        create_model_card(tmp_path / "absent", base_model="acme/Llama-mini")
    with pytest.raises(UsageError, match=r"has no config\.json"):
        create_model_card(tmp_path, base_model="acme/Llama-mini")
    folder = write(tmp_path / "out")
    card(folder)
    with pytest.raises(UsageError, match=r"README\.md exists already"):
        card(folder)
    (folder / "report.json").write_text("{")
    with pytest.raises(UsageError, match=r"report\.json is not JSON"):
        card(folder, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["README.md", "config.json", "prune_plan.json", "report.json"]
    )


def test_a_report_that_does_not_belong_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"report\.json is of plan 000000000000, prune_plan\.json is [0-9a-f]{12}"):
        card(write(tmp_path / "a", {"stages": stages(10.0), "plan": {"hash": "0" * 64}}))
    measured = stages(10.0, 12.5)
    measured[1]["perplexity"]["wikitext2"] = perplexity(12.5, tokens=999)
    with pytest.raises(UsageError, match="wikitext2 has tokens=1000 for dense but 999 for pruned"):
        card(write(tmp_path / "b", {"stages": measured}))
    assert not (tmp_path / "b" / "README.md").exists()


def test_ridges_are_counted_in_a_line(tmp_path: Path) -> None:
    folder = write(tmp_path)
    ridges = {"0.q_proj": 0.01, "0.down_proj": 0.001, "1.down_proj": 0.01}
    identity.write_identity(folder, ridges=ridges, compensation="least_squares")
    text = card(folder).content
    assert "relative to the mean diagonal: 0.001 (1 matrix), 0.01 (2 matrices)." in text


def test_what_the_steps_did_is_a_line(tmp_path: Path) -> None:
    folder = write(tmp_path)
    steps = [(0.2, 0.15, True), (0.15, 0.16, False), (0.15, 0.12, True)]
    passes = [{"length": 1.0, "before": before, "after": after, "kept": kept} for before, after, kept in steps]
    identity.write_identity(folder, passes=passes, compensation="natural_gradient")
    assert "2 of 3 passes kept, KL(dense, pruned) on held-out windows 0.2000 -> 0.1200 nats per token." in card(folder).content
    identity.write_identity(folder, passes=passes[1:2], compensation="natural_gradient")
    assert "none of 1 passes lowered the held-out divergence." in card(folder, overwrite=True).content
