"""Compensation `bias`: what it adds by hand, what it counts, and that the mean of what went comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import tiny_llama, token_ids
from transformers import AutoModelForCausalLM

from hf_gqaprune import Calibration, PruningPlan, collect_statistics, make_plan, prune
from hf_gqaprune.cli import main
from hf_gqaprune.dependency_graph import trace_units
from hf_gqaprune.errors import UsageError
from hf_gqaprune.models.blocks import OUTPUT_PROJECTION
from hf_gqaprune.models.shapes import LayerShape
from hf_gqaprune.plan import LayerPlan
from hf_gqaprune.streaming.prune import prune_checkpoint
from hf_gqaprune.surgery import prune_layer

IDS = token_ids(16, 12)
SIZES = ({"ratio": 0.2}, {"backbone_ratio": 0.4}, {"backbone_ratio": 0.5, "min_kv_heads": 0, "min_ffn": 0})


@pytest.mark.parametrize("had", [False, True])
def test_bias_by_hand(had: bool) -> None:
    """Hidden size 1, two KV heads of width 1, three FFN channels; group 1 and channel 1 stay."""
    (slices,) = trace_units((LayerShape(2, 2, 3, 1),))
    state = {f"self_attn.{name}_proj.weight": torch.tensor([[2.0], [3.0]]) for name in "qkv"}
    state |= {f"mlp.{name}_proj.weight": torch.tensor([[1.0], [2.0], [3.0]]) for name in ("gate", "up")}
    state |= {"self_attn.o_proj.weight": torch.tensor([[4.0, 5.0]]), "mlp.down_proj.weight": torch.tensor([[1.0, 2.0, 3.0]])}
    state |= {f"{name}_layernorm.weight": torch.ones(1) for name in ("input", "post_attention")}
    if had:
        biases = {name.replace("weight", "bias"): w[:, 0] / 10 for name, w in state.items() if "proj" in name}
        state |= biases
    before = {name: tensor.clone() for name, tensor in state.items()}
    means = {"attention": torch.tensor([0.5, 7.0]), "mlp": torch.tensor([10.0, 20.0, 30.0])}
    kept = LayerPlan((1,), (1,), (1,))
    new = prune_layer(state, kept, slices, {}, means=means)
    # column 0 of o_proj goes: 4 * 0.5; columns 0 and 2 of down_proj: 1 * 10 + 3 * 30
    assert new["self_attn.o_proj.bias"].tolist() == pytest.approx([2 + (0.4 if had else 0)])
    assert new["mlp.down_proj.bias"].tolist() == pytest.approx([100 + (0.1 if had else 0)])
    for name in ("q", "k", "v"):
        assert new[f"self_attn.{name}_proj.bias"].tolist() == pytest.approx([0.3 if had else 0])
    for name in ("gate", "up"):
        assert new[f"mlp.{name}_proj.bias"].tolist() == pytest.approx([0.2 if had else 0])
    assert new["mlp.down_proj.weight"].tolist() == [[2.0]]
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
    # a block that goes has no bias
    assert not any(name.startswith("mlp") for name in prune_layer(state, LayerPlan((1,), (1,), ()), slices, {}, means=means))


@pytest.mark.parametrize("demand", SIZES)
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_the_biases_count(tmp_path: Path, demand: dict[str, Any], allocation: str) -> None:
    model = tiny_llama(kv_heads=4, ffn=48, layers=3)
    statistics = collect_statistics(model, Calibration.from_ids(IDS), criterion="flap")
    plan = make_plan(statistics, allocation=allocation, compensation="bias", **demand)
    name = next(iter(demand))
    whole = plan.before.parameters if name == "ratio" else plan.before.backbone_parameters
    channel = 3 * model.config.hidden_size + 2
    assert abs(getattr(plan, name) - demand[name]) * whole <= channel / 2 + 1
    assert "biases added" in plan.allocation
    pruned = prune(model, plan, statistics, compensation="bias")
    assert pruned.num_parameters() == plan.after.parameters
    assert pruned.config.attention_bias and pruned.config.mlp_bias
    for key, bias in pruned.named_parameters():
        if key.endswith("bias") and not key.endswith(("o_proj.bias", "down_proj.bias")):
            assert not bias.any(), key
    pruned.save_pretrained(tmp_path / "pruned")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert torch.equal(again(IDS).logits, pruned(IDS).logits)
    # and pruned once more, by one whole plan
    second = make_plan(model=again, backbone_ratio=0.2)
    assert prune(again, second, compensation="none").num_parameters() == second.after.parameters
    assert plan.compose(second).after == second.after


@pytest.mark.parametrize("had", [False, True])
def test_the_mean_output_of_a_block_is_that_of_the_dense_one(had: bool) -> None:
    model = tiny_llama(layers=1, kv_heads=4, attention_bias=had, mlp_bias=had)
    statistics = collect_statistics(model, Calibration.from_ids(IDS), criterion="flap")
    plan = make_plan(statistics, backbone_ratio=0.4, compensation="bias", allocation="uniform")
    means = []
    for each in (model, prune(model, plan, statistics, compensation="bias")):
        linear = each.model.layers[0].get_submodule(OUTPUT_PROJECTION["attention"])
        seen: list[torch.Tensor] = []
        handle = linear.register_forward_hook(lambda _module, _args, output, seen=seen: seen.append(output))
        with torch.no_grad():
            each(IDS)
        handle.remove()
        means.append(seen[0].mean((0, 1)))
    torch.testing.assert_close(means[1], means[0], rtol=1e-4, atol=1e-5)


def test_channels_that_never_change_go_first_and_are_not_missed() -> None:
    model = tiny_llama(layers=1, kv_heads=2, mlp_bias=True, attention_bias=True)
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight[:5] = 0
            linear.bias[:5] = torch.arange(1.0, 6.0)
    statistics = collect_statistics(model, Calibration.from_ids(IDS), criterion="flap")
    assert sorted(statistics.blocks[0, "mlp"].curve.order[:5].tolist()) == list(range(5))
    source = statistics.source
    plan = PruningPlan(
        source, (LayerPlan.of_groups(source.layers[0], (0, 1), range(5, 12)),), attention_bias=True, mlp_bias=True
    )
    with torch.no_grad():
        given, sliced, dense = (
            m(IDS).logits
            for m in (
                prune(model, plan, statistics, compensation="bias"), prune(model, plan, compensation="none"), model
            )
        )  # fmt: skip
    torch.testing.assert_close(given, dense, rtol=1e-4, atol=1e-4)
    assert float((sliced - dense).abs().max()) > 0.1


def test_nothing_removed_is_nothing_added() -> None:
    model = tiny_llama()
    statistics = collect_statistics(model, Calibration.from_ids(IDS), criterion="flap")
    source = statistics.source
    whole = tuple(LayerPlan.of_groups(s, range(s.kv_heads), range(s.ffn)) for s in source.layers)
    plan = PruningPlan(source, whole, attention_bias=True, mlp_bias=True)
    pruned = prune(model, plan, statistics, compensation="bias")
    assert not any(bias.any() for name, bias in pruned.named_parameters() if name.endswith("bias"))
    with torch.no_grad():
        assert torch.equal(pruned(IDS).logits, model(IDS).logits)


def test_plan_and_compensation_belong_together(tmp_path: Path) -> None:
    model = tiny_llama()
    statistics = collect_statistics(model, Calibration.from_ids(IDS), criterion="flap")
    plain, grown = (make_plan(statistics, backbone_ratio=0.3, compensation=c) for c in (None, "bias"))
    with pytest.raises(UsageError, match="needs a plan that counts biases: make it with compensation='bias'"):
        prune(model, plain, statistics, compensation="bias")
    for compensation in ("natural_gradient", "least_squares", "none"):
        with pytest.raises(UsageError, match=f"adds biases, which compensation bias fills, not {compensation}"):
            prune(model, grown, statistics, compensation=compensation)
    with pytest.raises(UsageError, match="compensation bias needs statistics with moments"):
        prune(model, grown, compensation="bias")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UsageError, match="compensation bias needs the model in memory"):
        prune_checkpoint(tmp_path / "model", grown, tmp_path / "out", statistics=statistics, compensation="bias")
    # a bias for every linear is more than there is to remove
    with pytest.raises(UsageError, match=r"backbone_ratio=0.7 removes more .* \(at most 0\.\d+\)"):
        make_plan(statistics, backbone_ratio=0.7, compensation="bias")


def test_the_command_prunes_as_flap_does(tmp_path: Path, llama: Any, tokenizer: Any) -> None:
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    line = [str(tmp_path / "model"), "--backbone-ratio", "0.3", "--criterion", "flap", "--compensation", "bias"]
    line += ["--calibration", str(tmp_path / "text.txt"), "--samples", "16", "--seq-len", "32"]
    assert main(["plan", *line, "-o", str(tmp_path / "plan.json")]) == 0
    assert main(["prune", *line, "-o", str(tmp_path / "out")]) == 0
    plan = PruningPlan.load(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "out" / "prune_plan.json") == plan
    assert plan.attention_bias and plan.mlp_bias and plan.backbone_ratio == pytest.approx(0.3, abs=2e-3)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert pruned.num_parameters() == plan.after.parameters
    assert any(bias.any() for name, bias in pruned.named_parameters() if name.endswith("down_proj.bias"))
