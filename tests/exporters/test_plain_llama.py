"""A plain Llama computes what the checkpoint does, with zeros where layers were smaller."""

from __future__ import annotations

import json

import pytest
import torch
from support.served import ARCHITECTURES, served_checkpoint
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import hf_gqaprune as gp
from hf_gqaprune.checkpoint import fingerprint, read_identity, resolve_model, write_identity
from hf_gqaprune.plan import LayerPlan


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_are_equal(name, tmp_path):
    model = served_checkpoint(name, tmp_path / "model")
    exported = gp.export(tmp_path / "model", tmp_path / "plain", to="llama", pad=not name.startswith("equal"))
    plain = AutoModelForCausalLM.from_pretrained(exported.path)
    assert type(plain) is LlamaForCausalLM
    ids = torch.randint(2, 1024, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, model(ids).logits, atol=2e-5)
    added = plain.num_parameters() - model.num_parameters()
    assert exported.added_parameters == added
    assert (f"{added:,} parameters come back as zeros" in exported.notes[0]) == (added > 0)


def test_a_checkpoint_of_equal_layers_is_copied_bit_for_bit(tmp_path):
    exported = gp.export("demo", tmp_path / "plain", to="llama")
    demo = resolve_model("demo").path
    assert fingerprint(exported.path) == fingerprint(demo) == read_identity(exported.path)["fingerprint"]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"):
        ours, theirs = (json.loads((folder / name).read_text()) for folder in (exported.path, demo))
        ours.pop("transformers_version", None), theirs.pop("transformers_version", None)
        assert ours == theirs


def test_a_pruned_checkpoint_of_equal_layers_needs_no_padding(tmp_path):
    model = served_checkpoint("equal layers", tmp_path / "dense")
    layers = tuple(LayerPlan((0, 2), (0, 1, 4, 5), tuple(range(0, 96, 2))) for _ in range(3))
    plan = gp.PruningPlan(gp.PruningPlan.keep_all(model.config).source, layers)
    gp.prune(model, plan, compensation="none").save_pretrained(tmp_path / "pruned")
    write_identity(tmp_path / "pruned", calibration=[{"name": "books", "split": "train"}])
    exported = gp.export(tmp_path / "pruned", tmp_path / "plain", to="llama")
    assert exported.added_parameters == 0
    plain, pruned = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("plain", "pruned"))
    ids = torch.arange(2, 22)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, pruned(ids).logits)
    # no text that it was calibrated on is evaluated on
    assert read_identity(exported.path)["calibration"] == [{"name": "books", "split": "train"}]


def test_layers_that_differ_are_refused_with_the_price_of_padding(tmp_path):
    served_checkpoint("unequal KV heads", tmp_path / "model")
    with pytest.raises(gp.UsageError) as error:
        gp.export(tmp_path / "model", tmp_path / "plain", to="llama")
    text = str(error.value)
    assert "layer 1 has 4 query / 2 KV heads and FFN 96; a plain Llama has the same in every layer" in text
    added = gp.export(tmp_path / "model", tmp_path / "plain", to="llama", pad=True).added_parameters
    assert f"--pad makes them 8 / 4 and 96 with {added:,} zeros" in text


def test_query_heads_divide_the_hidden_size(tmp_path):
    # 14 heads do not divide 48; 2 groups of 8 are the next that do
    served_checkpoint("n_rep 4 to 7", tmp_path / "model")
    exported = gp.export(tmp_path / "model", tmp_path / "plain", to="llama", pad=True)
    assert "every layer has 16 query / 2 KV heads and FFN 64" in exported.notes[0]
    served_checkpoint("unequal KV heads", tmp_path / "narrow", hidden_size=4)
    with pytest.raises(gp.UsageError, match="8 query heads are more than hidden_size=4 of a plain Llama has room for"):
        gp.export(tmp_path / "narrow", tmp_path / "never", to="llama", pad=True)


def test_what_exists_stays_and_what_fails_leaves_nothing(tmp_path):
    served_checkpoint("equal layers", tmp_path / "model")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("hard work")
    with pytest.raises(gp.UsageError, match="mine exists already"):
        gp.export(tmp_path / "model", tmp_path / "mine", to="llama")
    with pytest.raises(gp.UsageError, match="would be replaced by the output"):
        gp.export(tmp_path / "model", tmp_path / "model", to="llama", overwrite=True)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(gp.UsageError, match="truncated|corrupt"):
        gp.export(tmp_path / "model", tmp_path / "plain", to="llama")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "model"]
