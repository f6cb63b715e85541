"""Models and texts at the edge: each is pruned to something that works, or refused in one line that names the trouble."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import VOCABULARY, tiny_llama, token_ids
from transformers import LlamaForCausalLM

from hf_gqaprune import Calibration, collect_statistics, make_plan, prune
from hf_gqaprune.cli import main
from hf_gqaprune.compensation.columns import refit_columns
from hf_gqaprune.errors import UsageError, WorkError
from hf_gqaprune.statistics.criteria import CRITERIA
from hf_gqaprune.statistics.moments import Moments
from hf_gqaprune.surgery import COMPENSATIONS

IDS = token_ids(16, 12)
Edit = Callable[[Any], None]


def layers(edit: Edit) -> Edit:
    """Do something to every decoder layer."""
    return lambda model: [edit(layer) for layer in model.model.layers] and None


def dead_channels(layer: Any) -> None:
    """The first four FFN channels and the first KV group give zero."""
    layer.mlp.up_proj.weight[:4] = 0
    layer.self_attn.v_proj.weight[:8] = 0


def twins(layer: Any) -> None:
    """Every FFN channel and every KV group twice: H has half its rank."""
    for linear, half in ((layer.mlp.gate_proj, 6), (layer.mlp.up_proj, 6)):
        linear.weight[half:] = linear.weight[:half]
    for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
        linear.weight[len(linear.weight) // 2 :] = linear.weight[: len(linear.weight) // 2]


def silent_ffn(layer: Any) -> None:
    layer.mlp.up_proj.weight.zero_()


def silent_attention(layer: Any) -> None:
    layer.self_attn.v_proj.weight.zero_()


def ignored(layer: Any) -> None:
    """What the blocks compute goes nowhere."""
    layer.mlp.down_proj.weight.zero_()
    layer.self_attn.o_proj.weight.zero_()


def outlier(layer: Any) -> None:
    layer.mlp.up_proj.weight[0] *= 1e8


def whisper(layer: Any) -> None:
    """Inputs of down_proj whose squares are below the normal numbers of float32."""
    layer.mlp.up_proj.weight *= 1e-21


CASES: dict[str, tuple[dict[str, Any], Edit | None, torch.Tensor]] = {
    "fewer tokens than channels": ({"ffn": 64}, None, token_ids(8, 3)),
    "one window of two tokens": ({}, None, token_ids(1, 2)),
    "one token all along": ({}, None, torch.full((16, 12), 5)),
    "a vocabulary larger than the text": ({"vocab_size": 5000}, None, IDS),
    "channels that are zero": ({}, layers(dead_channels), IDS),
    "rank-deficient moments": ({}, layers(twins), IDS),
    "FFN inputs all zero": ({}, layers(silent_ffn), IDS),
    "attention inputs all zero": ({}, layers(silent_attention), IDS),
    "no gradient at any output": ({}, layers(ignored), IDS),
    "a channel that dwarfs the others": ({}, layers(outlier), IDS),
    "squares that underflow": ({}, layers(whisper), IDS),
    "one layer": ({"layers": 1}, None, IDS),
    "one KV head": ({"kv_heads": 1, "n_rep": 4, "ffn": 40}, None, IDS),
    "one FFN channel": ({"kv_heads": 4, "ffn": 1}, None, IDS),
}


def edge(name: str) -> tuple[LlamaForCausalLM, Calibration]:
    shape, edit, ids = CASES[name]
    model = tiny_llama(**shape)
    if edit is not None:
        with torch.no_grad():
            edit(model)
    return model, Calibration.from_ids(ids)


def finite(model: Any) -> bool:
    weights = all(bool(torch.isfinite(weight).all()) for weight in model.state_dict().values())
    return weights and bool(torch.isfinite(model(IDS[:2]).logits).all())


@pytest.mark.parametrize("criterion", list(CRITERIA))
@pytest.mark.parametrize("case", list(CASES))
def test_every_criterion_gives_a_plan_of_the_size_asked_for(case: str, criterion: str) -> None:
    model, calibration = edge(case)
    statistics = collect_statistics(model, calibration, criterion=criterion)
    for allocation in ("global", "uniform"):
        plan = make_plan(statistics, backbone_ratio=0.4, allocation=allocation, min_kv_heads=0, min_ffn=0)
        if model.config.intermediate_size > 1:
            channel = 3 * model.config.hidden_size / statistics.source.cost.backbone_parameters
            assert abs(plan.backbone_ratio - 0.4) <= channel
        assert finite(prune(model, plan, compensation="none"))


@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize("case", list(CASES))
def test_every_compensation_gives_finite_weights(case: str, compensation: str) -> None:
    model, calibration = edge(case)
    statistics = collect_statistics(model, calibration)
    plan = make_plan(statistics, backbone_ratio=0.25, compensation=compensation)
    if compensation == "natural_gradient" and len(calibration.ids) < 8:
        with pytest.raises(UsageError, match="give at least 8"):
            prune(model, plan, statistics, compensation=compensation)
        return
    assert finite(prune(model, plan, statistics, compensation=compensation))


@pytest.mark.parametrize("criterion", ["curvature", "taylor", "taylor_unit", "wanda", "flap"])
def test_what_gives_zero_goes_first_and_is_not_missed(criterion: str) -> None:
    model, calibration = edge("channels that are zero")
    statistics = collect_statistics(model, calibration, criterion=criterion)
    for (_, kind), block in statistics.blocks.items():
        count = 4 if kind == "mlp" else 1
        assert sorted(block.curve.order[:count].tolist()) == list(range(count))
        # flap's scores are relative, and curvature's ridge asks for a little
        assert criterion in ("flap", "curvature") or float(block.curve.cost[count - 1]) == 0
    # four of twelve channels and one of two groups in every layer
    attention, channel = 8 * (2 + 2 * 2), 3
    share = (attention + 4 * channel) * model.config.hidden_size * 2 / statistics.source.cost.backbone_parameters
    plan = make_plan(statistics, backbone_ratio=share, allocation="uniform")
    assert {layer.kv_groups for layer in plan.layers} == {(1,)}
    assert {layer.ffn_channels for layer in plan.layers} == {tuple(range(4, 12))}
    with torch.no_grad():
        given = prune(model, plan, compensation="none")(IDS).logits
        torch.testing.assert_close(given, model(IDS).logits, rtol=1e-5, atol=1e-5)


def test_of_twins_one_goes_and_the_other_takes_over() -> None:
    model, calibration = edge("rank-deficient moments")
    statistics = collect_statistics(model, calibration)
    block = statistics.blocks[0, "mlp"]
    assert sorted((block.curve.order[:6] % 6).tolist()) == list(range(6))
    linear = model.model.layers[0].mlp.down_proj.weight.detach()
    kept = block.curve.order[6:].sort().values
    assert block.moments is not None
    refitted = refit_columns(linear, block.moments, kept)
    both = linear[:, kept % 6] + linear[:, kept % 6 + 6]
    # but for the ridge
    assert float((refitted - both).norm() / both.norm()) < 0.1


def test_moments_of_nothing_keep_the_weights() -> None:
    nothing = Moments(7, torch.zeros(3, 3), torch.zeros(3))
    weight = torch.tensor([[1.0, 2.0, 3.0]])
    assert refit_columns(weight, nothing, torch.tensor([0, 2])).tolist() == [[1.0, 3.0]]
    # denormal numbers are no better: [[1, 2], [2, 1]] times the least there is is not positive definite
    least = torch.finfo(torch.float32).tiny / 2**23
    noise = Moments(7, least * torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.zeros(2))
    assert refit_columns(weight[:, :2], noise, torch.tensor([1])).tolist() == [[2.0]]


def test_more_than_one_kv_head_holds_is_refused_with_what_is_possible() -> None:
    model, calibration = edge("one KV head")
    statistics = collect_statistics(model, calibration)
    with pytest.raises(UsageError, match=r"backbone_ratio=0.9 removes more .* min_kv_heads=1 and min_ffn=1 \(at most 0\."):
        make_plan(statistics, backbone_ratio=0.9)
    one, calibration = edge("one layer")
    statistics = collect_statistics(one, calibration)
    # the only attention there is stays whatever the floor
    assert make_plan(statistics, backbone_ratio=0.6, min_kv_heads=0, min_ffn=0).layers[0].kv_groups


@pytest.mark.parametrize("token", [VOCABULARY, -1])
def test_tokens_that_the_model_does_not_have_are_refused(token: int) -> None:
    ids = IDS.clone()
    ids[3, 4] = token
    with pytest.raises(UsageError, match=f"calibration token {token} is outside the model's vocabulary of {VOCABULARY}"):
        collect_statistics(tiny_llama(), Calibration.from_ids(ids))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("criterion", ["curvature", "taylor", "wanda", "magnitude"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.embed_tokens.weight", "model.embed_tokens.weight holds values"),
        ("model.norm.weight", "model.norm.weight holds values"),
        ("lm_head.weight", "lm_head.weight holds values"),
        ("model.layers.1.mlp.gate_proj.weight", "layer 1: mlp.gate_proj.weight holds values"),
        ("model.layers.0.input_layernorm.weight", "layer 0: input_layernorm.weight holds values"),
    ],
)
def test_a_weight_that_is_not_finite_is_named(name: str, said: str, criterion: str, value: float) -> None:
    model = tiny_llama()
    model.get_parameter(name).data.view(-1)[-1] = value
    with pytest.raises(WorkError, match=f"{said} that are not finite; repair the checkpoint first"):
        collect_statistics(model, Calibration.from_ids(IDS), criterion=criterion)


@pytest.mark.parametrize("compensation", COMPENSATIONS)
def test_pruning_names_a_weight_that_was_finite_when_it_was_measured(compensation: str) -> None:
    model, calibration = edge("one layer")
    statistics = collect_statistics(model, calibration)
    plan = make_plan(statistics, backbone_ratio=0.2, compensation=compensation)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(WorkError, match="layer 0: mlp.down_proj.weight holds values that are not finite"):
        prune(model, plan, statistics, compensation=compensation)


@pytest.mark.parametrize("compensation", ["least_squares", "natural_gradient"])
def test_activations_that_overflow_while_pruning_are_named(compensation: str) -> None:
    """Inputs of down_proj are infinite in a model that was measured when they were not."""
    model = tiny_llama(layers=3)
    statistics = collect_statistics(model, Calibration.from_ids(IDS))
    plan = make_plan(statistics, backbone_ratio=0.3)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(3e38)
    with pytest.raises(WorkError, match="layer 1 mlp: activations overflow while it is refitted"):
        prune(model, plan, statistics, compensation=compensation)


@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_activations_that_overflow_are_named(criterion: str) -> None:
    """Finite weights, and an FFN in layer 1 whose products are not."""
    model = tiny_llama(layers=3)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(3e38)
    with pytest.raises(WorkError, match=r"(first in|^)( )?layer 1 mlp"):
        collect_statistics(model, Calibration.from_ids(IDS), criterion=criterion)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_logits_that_overflow_are_told_from_activations() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    with pytest.raises(WorkError, match="loss on calibration text is .*, first in the head"):
        collect_statistics(model, Calibration.from_ids(IDS), criterion="taylor")


TEXT = "the quick brown fox jumps over the lazy dog, and then it counts: one two three four five. " * 20


@pytest.mark.parametrize(
    ("edit", "status", "said"),
    [
        (layers(silent_ffn), 0, ""),
        (lambda model: model.lm_head.weight.fill_(float("nan")), 1, "lm_head.weight holds values that are not finite"),
        (lambda model: model.model.layers[2].mlp.up_proj.weight.fill_(3e38), 1, "first in layer 2 mlp"),
    ],
)
def test_the_command_says_so_in_one_line(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, tmp_path: Path, llama: Any, tokenizer: Any, edit: Edit, status: int, said: str
) -> None:
    with torch.no_grad():
        edit(llama)
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    capsys.readouterr()
    # a few tokens are warned of
    caplog.set_level(logging.ERROR, "hf_gqaprune")
    line = ["prune", str(tmp_path / "model"), "--backbone-ratio", "0.3", "--calibration", str(tmp_path / "text.txt")]
    assert main([*line, "--samples", "8", "--seq-len", "16", "-o", str(tmp_path / "out")]) == status
    told = capsys.readouterr().err.strip()
    assert said in told and "Traceback" not in told
    assert (tmp_path / "out").exists() is (status == 0)
    assert status == 0 or len(told.splitlines()) == 1
