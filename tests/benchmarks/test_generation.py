"""The generation benchmark on a tiny shape: what it reports is there, and what it would capture generates."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import generation
import pytest
import torch
from shapes import SHAPES
from transformers import LlamaConfig

from hf_gqaprune import PrunedLlamaForCausalLM
from hf_gqaprune.models.shapes import ModelShape
from hf_gqaprune.plan import LayerPlan, PruningPlan
from hf_gqaprune.surgery import pruned_config

CONFIG = LlamaConfig(**SHAPES["tiny"])
SIZES = argparse.Namespace(prefill=[2, 16], prompt=4, new_tokens=3, batches=[1, 3], repeat=1)


def test_every_ratio_is_measured_and_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.json"
    sizes = "--prefill 2 16 --prompt 4 --new-tokens 3 --batches 1 3 --repeat 1 --round-to 1 8".split()
    line = ["tiny", "--ratios", "0.2", "0.5", "--device", "cpu", *sizes, "-o", str(out)]
    monkeypatch.setattr(sys, "argv", ["generation.py", *line])
    generation.main()
    found = json.loads(out.read_text())
    assert (found["shape"], found["device"], found["prefill"], found["batches"]) == ("tiny", "cpu", [2, 16], [1, 3])
    dense, *pruned = found["models"]
    assert [(row["ratio"], row["round_to"]) for row in pruned] == [(0.2, 1), (0.2, 8), (0.5, 1), (0.5, 8)]
    names = {"prefill, tokens/s", "generate at 1, tokens/s", "generate at 3, tokens/s"}
    assert set(dense["speed"].values()) == set(dense["predicted"].values()) == {1.0} and dense["ratio"] == 0
    for row in pruned:
        assert row["parameters"] < dense["parameters"]
        assert set(row["measured"]) == set(row["speed"]) == names and min(row["measured"].values()) > 0
        assert row["speed"] == pytest.approx({name: row["measured"][name] / dense["measured"][name] for name in names})
        assert set(row["predicted"]) == {"prefill FLOPs", "FLOPs", "bytes at 1", "bytes at 3"}
        assert min(row["predicted"].values()) > 1
    smaller, smallest = pruned[0]["predicted"], pruned[2]["predicted"]
    assert all(smallest[name] > smaller[name] for name in smaller)
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + 1 + 4 and table[3].startswith("| 20% | 1 | ")


def test_what_a_model_needs_is_counted_by_hand() -> None:
    # per layer 64 x 8 (8 + 8 + 2 x 4) of attention and 3 x 64 x 96 of FFN; a head of 512 x 64; three norms in all of 2 + 2 + 1
    layers, head = 2 * (64 * 8 * 24 + 3 * 64 * 96), 512 * 64
    found = generation.cost(ModelShape.from_config(CONFIG), SIZES)
    weights, cache = 2 * (layers + head + 5 * 64), 7 * (2 * 2 * 4 * 8) * 2
    assert found == {
        "prefill FLOPs": pytest.approx(2 * (layers + head / 16)),
        "FLOPs": 2 * (layers + head),
        "bytes at 1": weights + cache,
        "bytes at 3": weights + 3 * cache,
    }
    tied = generation.cost(ModelShape.from_config(LlamaConfig(**SHAPES["tiny"] | {"tie_word_embeddings": True})), SIZES)
    assert tied == found


def test_the_models_are_those_of_the_plans() -> None:
    config = LlamaConfig(**SHAPES["tiny"] | {"num_hidden_layers": 8})
    plan = generation.random_plan(config, 0.5, 8)
    shapes = plan.target.layers
    assert plan.backbone_ratio == pytest.approx(0.5, abs=0.01)
    assert len({layer.kv_heads for layer in shapes}) > 1 and all(layer.ffn % 8 == 0 for layer in shapes)
    # half of attention goes, not all but one KV group of a layer
    assert sum(layer.kv_heads for layer in shapes) == pytest.approx(16, abs=1)
    model = generation.random_model(pruned_config(config, plan), "cpu")
    assert isinstance(model, PrunedLlamaForCausalLM) and not model.training
    assert model.num_parameters() == plan.after.parameters
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32 and model.config._attn_implementation == "sdpa"


def test_steps_on_a_static_cache_generate_what_generate_does() -> None:
    # weights that are large enough for attention to matter, in float32, as logits in bfloat16 are often equal
    config = LlamaConfig(**SHAPES["tiny"] | {"initializer_range": 0.3})
    shape = ModelShape.from_config(config)
    layers = [LayerPlan.of_groups(shape.layers[0], kept, range(40)) for kept in ((1,), (0, 2, 3))]
    torch.manual_seed(0)
    model = generation.random_model(pruned_config(config, PruningPlan(shape, tuple(layers))), "cpu").float()
    model.generation_config.eos_token_id = None
    ids = torch.randint(512, (3, 4))
    with torch.inference_mode():
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5)
        step, cache = generation.decoding_step(model, ids, 4 + 4)
        once = [step().clone() for _ in range(4)]
        cache.crop(-4)
        assert torch.equal(torch.cat(once, 1), whole[:, 5:])
        assert len(whole[0]) == 9 and len(set(whole[:, 5:].flatten().tolist())) > 4
        assert [layer.keys.shape[1:3] for layer in cache.layers] == [(1, 8), (3, 8)]
        generation.take(4, step, cache)
        assert cache.get_seq_length() == 4
