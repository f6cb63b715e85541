"""Criteria by hand on small numbers, curvature against brute force, statistics that survive the disk."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.costs import refit_cost
from support.tiny import tiny_llama, token_ids
from torch.nn import functional as F
from transformers import MistralConfig, MistralForCausalLM

from hf_gqaprune import Calibration, Statistics, collect_statistics, make_plan, prune
from hf_gqaprune.errors import UsageError, WorkError
from hf_gqaprune.linalg.obs import _remove_blocks, remove_greedily
from hf_gqaprune.statistics.criteria import CRITERIA, Block
from hf_gqaprune.statistics.moments import Curve, Moments
from hf_gqaprune.statistics.store import _half, _square, half_size


def ffn_block(
    gate: Sequence[float] = (1, 3), up: Sequence[float] = (2, -1), down: Sequence[float] = (-4, 2), **kwargs: Any
) -> Block:
    """An FFN with hidden size 1, by default of two channels."""
    index = torch.arange(len(down))[:, None]
    return Block(
        layer=0,
        kind="mlp",
        weights={
            "mlp.gate_proj": torch.tensor(gate, dtype=torch.float32)[:, None],
            "mlp.up_proj": torch.tensor(up, dtype=torch.float32)[:, None],
            "mlp.down_proj": torch.tensor(down, dtype=torch.float32)[None],
        },
        units={"mlp.gate_proj": (0, index), "mlp.up_proj": (0, index), "mlp.down_proj": (1, index)},
        **kwargs,
    )


GRADIENTS = {
    "mlp.gate_proj": torch.tensor([[1.0], [1.0]]),
    "mlp.up_proj": torch.tensor([[2.0], [1.0]]),
    "mlp.down_proj": torch.tensor([[1.0], [-2.0]]).T,
}


@pytest.mark.parametrize(
    ("criterion", "order", "cost"),
    [
        ("magnitude", [1, 0], [9 + 1 + 4, 14 + 1 + 4 + 16]),
        ("magnitude_l1", [1, 0], [3 + 1 + 2, 6 + 1 + 2 + 4]),
        # w * g: channel 0 has 1, 4, -4; channel 1 has 3, -1, -4
        ("taylor", [1, 0], [3 + 1 + 4, 8 + 1 + 4 + 4]),
        ("taylor_unit", [0, 1], [1, 1 + 2]),
        # minus the sums -1 and 2, shifted so that the least is zero
        ("taylor_signed", [0, 1], [0, 3]),
        # ||x_0|| = 2, ||x_1|| = 3, times |down| 4 and 2
        ("wanda", [1, 0], [6, 6 + 8]),
    ],
)
def test_criteria_by_hand(criterion: str, order: list[int], cost: list[float]) -> None:
    moments = Moments(1, torch.tensor([[4.0, 1.0], [1.0, 9.0]]), torch.zeros(2))
    curve = CRITERIA[criterion].curve(ffn_block(moments=moments, gradients=GRADIENTS))
    assert curve.order.tolist() == order
    assert curve.cost.tolist() == pytest.approx(cost, rel=1e-12)
    assert curve.cost.dtype == torch.float64


def test_flap_of_inputs_that_never_change_ranks_nothing() -> None:
    moments = Moments(1, torch.tensor([[1.0, 2.0], [2.0, 4.0]]), torch.tensor([1.0, 2.0]))
    assert CRITERIA["flap"].curve(ffn_block(moments=moments)).cost.tolist() == [3.0, 6.0]


def test_curvature_by_hand() -> None:
    """H + ridge I = diag(4.065, 9.065) and G = 0.5: removing column j alone costs G w_j^2 H_jj, nothing to re-fit."""
    moments = Moments(1, torch.diag(torch.tensor([4.0, 9.0])), torch.zeros(2), torch.tensor([[0.5]]))
    curve = CRITERIA["curvature"].curve(ffn_block(moments=moments))
    second, first = 0.5 * 16 * 4.065, 0.5 * 4 * 9.065
    assert curve.order.tolist() == [1, 0]
    assert curve.cost.tolist() == pytest.approx([first, first + second], rel=1e-6)


def test_flap_by_hand() -> None:
    """Variances 2 - 1, 1.5 - 1 and 10 - 4, squared weights 1, 4 and 1: fluctuations 1, 2 and 6.

    Their mean is 3 and their variance (4 + 1 + 9) / 2 = 7; every channel has 3 weights.
    """
    moments = Moments(9, torch.diag(torch.tensor([2, 1.5, 10])), torch.tensor([1.0, -1.0, 2.0]))
    curve = CRITERIA["flap"].curve(ffn_block((9, 1, 5), (1, 1, 1), (1, -2, 1), moments=moments))
    steps = [3 * math.exp(z / math.sqrt(7)) for z in (-2, -1, 3)]
    assert curve.order.tolist() == [0, 1, 2]
    assert curve.cost.tolist() == pytest.approx(list(itertools.accumulate(steps)), rel=1e-6)


def test_flap_sums_the_columns_of_a_group_and_counts_its_weights() -> None:
    """Two groups always stand at -1/sqrt(2) and 1/sqrt(2); each has 1 + 1 + 2 + 2 weights."""
    # fluctuations per column 5, 0, 2, 2: the column that varies most is in the group that varies most
    moments = Moments(4, torch.diag(torch.tensor([5.0, 0.0, 2.0, 2.0])), torch.zeros(4))
    curve = CRITERIA["flap"].curve(group_block([1.0, 1.0, 1.0, 1.0], moments=moments))
    low, high = (6 * math.exp(sign / math.sqrt(2)) for sign in (-1, 1))
    assert curve.order.tolist() == [1, 0]
    assert curve.cost.tolist() == pytest.approx([low, low + high], rel=1e-6)


@pytest.mark.parametrize("values", [[0.7], [0.7, 0.7, 0.7], [0.0, 0.0]])
def test_flap_of_equal_units_is_their_size(values: list[float]) -> None:
    count = len(values)
    moments = Moments(4, torch.diag(torch.tensor(values)), torch.zeros(count))
    curve = CRITERIA["flap"].curve(ffn_block((1,) * count, (1,) * count, (0.3,) * count, moments=moments))
    assert curve.cost.tolist() == [3 * n for n in range(1, count + 1)]


def group_block(output: list[float], **kwargs: Any) -> Block:
    """Attention with hidden size 1 and two groups of two query heads of width 1: K ones, V twos, Q threes."""
    one = torch.ones
    pairs = torch.tensor([[0, 1], [2, 3]])
    return Block(
        0,
        "attention",
        {"self_attn.k_proj": one(2, 1), "self_attn.v_proj": 2 * one(2, 1), "self_attn.q_proj": 3 * one(4, 1)}
        | {"self_attn.o_proj": torch.tensor([output])},
        {
            "self_attn.k_proj": (0, torch.tensor([[0], [1]])),
            "self_attn.v_proj": (0, torch.tensor([[0], [1]])),
            "self_attn.q_proj": (0, pairs),
            "self_attn.o_proj": (1, pairs),
        },
        **kwargs,
    )


def test_a_kv_group_counts_all_its_query_heads() -> None:
    """One criterion value per group: K row, V row, and the Q rows and O columns of both of its query heads."""
    curve = CRITERIA["magnitude_l1"].curve(group_block([1.0, 1.0, 5.0, 5.0]))
    assert curve.order.tolist() == [0, 1]
    assert curve.cost.tolist() == [1 + 2 + 6 + 2, 11 + 1 + 2 + 6 + 10]


def test_random_depends_on_seed_layer_and_kind_alone() -> None:
    first = CRITERIA["random"].curve(ffn_block(seed=3))
    # layer 0, FFN
    drawn = torch.rand(2, generator=torch.Generator().manual_seed(3 * 1_000_003 + 1), dtype=torch.float64)
    assert first.order.tolist() == drawn.argsort().tolist()
    assert first.cost.tolist() == [float(drawn.min()), float(drawn.sum())]
    assert torch.equal(first.cost, CRITERIA["random"].curve(ffn_block(seed=3)).cost)
    assert not torch.equal(first.cost, CRITERIA["random"].curve(ffn_block(seed=4)).cost)


def test_equal_scores_go_in_order() -> None:
    assert Curve.from_scores(torch.tensor([1.0, 0.0, 1.0, 0.0])).order.tolist() == [1, 3, 0, 2]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(1, 3), st.integers(1, 4))
def test_curvature_equals_brute_force(seed: int, units: int, width: int, rows: int) -> None:
    """At every step the cheapest unit goes, and the costs are those of re-fitting everything that is left."""
    generator = torch.Generator().manual_seed(seed)
    n = units * width

    def positive(size: int) -> torch.Tensor:
        x = torch.randn(size + 3, size, generator=generator, dtype=torch.float64)
        return x.T @ x / size + 0.1 * torch.eye(size, dtype=torch.float64)

    h, g = positive(n), positive(rows)
    weight = torch.randn(rows, n, generator=generator, dtype=torch.float64)
    columns = torch.randperm(n, generator=generator).view(units, width)
    order, cost = remove_greedily(h, weight.T @ g @ weight, columns)
    assert sorted(order.tolist()) == list(range(units))

    gone: list[int] = []
    for unit, total in zip(order.tolist(), cost.tolist(), strict=True):
        left = [u for u in range(units) if u not in gone]
        trials = {u: refit_cost(weight, h, g, columns[[v for v in left if v != u]].flatten().tolist()) for u in left}
        assert total == pytest.approx(trials[unit], rel=1e-8, abs=1e-10)
        assert trials[unit] <= min(trials.values()) * (1 + 1e-8) + 1e-10
        gone.append(unit)


@pytest.mark.parametrize("shuffled", [False, True])
def test_lazy_updates_equal_eager_ones(shuffled: bool) -> None:
    """600 single columns cross flushes and strips; the general path removes them as blocks of width one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(700, 600, generator=generator, dtype=torch.float64)
    h = x.T @ x / 700 + 0.05 * torch.eye(600, dtype=torch.float64)
    weight = torch.randn(20, 600, generator=generator, dtype=torch.float64)
    gram = weight.T @ weight
    columns = torch.randperm(600, generator=generator)[:, None] if shuffled else torch.arange(600)[:, None]
    given = h.clone(), gram.clone()
    order, cost = remove_greedily(h, gram, columns)
    assert torch.equal(h, given[0]) and torch.equal(gram, given[1])
    slow_order, slow_steps = _remove_blocks(torch.linalg.inv(h), gram, columns)
    assert order.tolist() == slow_order
    assert torch.allclose(cost, torch.tensor(slow_steps, dtype=torch.float64).cumsum(0), rtol=1e-8)


def collected(criterion: str, **kwargs: Any) -> Statistics:
    return collect_statistics(tiny_llama(**kwargs), Calibration.from_ids(token_ids(3, 12)), criterion=criterion)


def test_moments_are_those_of_the_projection_inputs_and_output_gradients() -> None:
    model = tiny_llama(layers=1, attention_bias=True)
    ids = token_ids(3, 12)
    statistics = collect_statistics(model, Calibration.from_ids(ids), criterion="curvature")
    seen: dict[str, torch.Tensor] = {}
    down = model.model.layers[0].mlp.down_proj

    def watch(_module: torch.nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        output.retain_grad()
        seen.update(x=args[0], y=output)

    handle = down.register_forward_hook(watch)
    logits = model(ids).logits
    handle.remove()
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    x, g = seen["x"].detach().flatten(0, 1).double(), seen["y"].grad.flatten(0, 1).double()  # type: ignore[union-attr]
    moments = statistics.blocks[0, "mlp"].moments
    assert moments is not None and moments.gradients is not None
    assert moments.tokens == 36
    # each token counts as much as its output gradient has energy
    weight = g.square().sum(1, keepdim=True)
    assert torch.allclose(moments.inputs.double(), (weight * x).T @ x / weight.sum(), rtol=1e-4, atol=1e-6)
    assert torch.allclose(moments.input_mean.double(), x.mean(0), rtol=1e-5, atol=1e-6)
    assert torch.allclose(moments.gradients.double(), g.T @ g / 36, rtol=1e-4, atol=1e-6)


def test_taylor_uses_the_gradient_of_the_summed_loss() -> None:
    model = tiny_llama(layers=1)
    ids = token_ids(3, 12)
    statistics = collect_statistics(model, Calibration.from_ids(ids), criterion="taylor")
    F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    mlp = model.model.layers[0].mlp
    terms = {p: (p.weight * p.weight.grad).abs() for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)}
    scores = terms[mlp.gate_proj].sum(1) + terms[mlp.up_proj].sum(1) + terms[mlp.down_proj].sum(0)
    curve = statistics.blocks[0, "mlp"].curve
    assert curve.order.tolist() == scores.argsort().tolist()
    assert torch.allclose(curve.cost, scores.sort().values.double().cumsum(0), rtol=1e-4)


@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_a_pass_leaves_the_model_as_it_was(criterion: str) -> None:
    model = tiny_llama().train()
    model.model.norm.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    statistics = collect_statistics(model, Calibration.from_ids(token_ids()), criterion=criterion)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert list(statistics.blocks) == list(itertools.product(range(2), ("attention", "mlp")))
    for block in statistics.blocks.values():
        assert sorted(block.curve.order.tolist()) == list(range(len(block.curve.order)))
        assert bool((block.curve.cost.diff() >= 0).all())


@pytest.mark.parametrize("criterion", ["curvature", "taylor", "flap"])
def test_statistics_round_trip_exactly(tmp_path: Path, criterion: str) -> None:
    statistics = collected(criterion, layers=2)
    statistics.save(tmp_path / "statistics")
    loaded = Statistics.load(tmp_path / "statistics")
    assert (loaded.source, loaded.criterion, loaded.seed) == (statistics.source, criterion, 0)
    assert loaded.calibration is not None and statistics.calibration is not None
    assert torch.equal(loaded.calibration.ids, statistics.calibration.ids)
    assert loaded.blocks.keys() == statistics.blocks.keys()
    for key, block in statistics.blocks.items():
        again = loaded.blocks[key]
        assert torch.equal(block.curve.order, again.curve.order)
        assert torch.equal(block.curve.cost, again.curve.cost)
        assert block.moments is not None and again.moments is not None
        assert block.moments.tokens == again.moments.tokens
        for name in ("inputs", "input_mean", "gradients"):
            old, new = getattr(block.moments, name), getattr(again.moments, name)
            if old is None:
                assert new is None
            else:
                assert torch.equal(old, new)
    model = tiny_llama(layers=2)
    plan = make_plan(statistics, backbone_ratio=0.3)
    assert make_plan(loaded, backbone_ratio=0.3).to_json() == plan.to_json()
    one, two = (prune(model, plan, s, compensation="least_squares").state_dict() for s in (statistics, loaded))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_statistics_folders_are_refused_when_broken(tmp_path: Path) -> None:
    folder = tmp_path / "statistics"
    statistics = collected("wanda")
    statistics.save(folder)
    with pytest.raises(UsageError, match="statistics exists already"):
        statistics.save(folder)
    statistics.save(folder, overwrite=True, moments=False)
    bare = Statistics.load(folder).blocks[0, "mlp"]
    assert bare.moments is None and not bare.has_moments
    (folder / "layer-001.mlp.safetensors").unlink()
    with pytest.raises(UsageError, match="incomplete: .*layer-001.mlp.safetensors is missing"):
        Statistics.load(folder)
    with pytest.raises(UsageError, match="holds no readable statistics.json"):
        Statistics.load(tmp_path / "absent")
    (folder / "statistics.json").write_text('{"version": 7}', encoding="utf-8")
    with pytest.raises(UsageError, match="statistics of version 7, this release reads 4"):
        Statistics.load(folder)


@pytest.mark.parametrize("n", [1, 2, 255, 256, 257, 512, 700])
def test_half_of_a_symmetric_matrix_is_the_whole(n: int) -> None:
    matrix = torch.randn(n, n, generator=torch.Generator().manual_seed(n))
    matrix += matrix.T.clone()
    half = _half(matrix)
    assert len(half) == half_size(n) <= n * n
    assert torch.equal(_square(half), matrix)


def test_one_pass_serves_any_number_of_plans() -> None:
    """Plans of other sizes, floors and allocations, and pruning by them, leave the statistics as they were."""
    model = tiny_llama(kv_heads=4, ffn=24)
    calibration = Calibration.from_ids(token_ids(16, 12))
    statistics, untouched = (collect_statistics(model, calibration) for _ in range(2))
    demands: list[dict[str, Any]] = [
        {"backbone_ratio": 0.2},
        {"ratio": 0.3, "allocation": "uniform"},
        {"backbone_ratio": 0.6, "min_kv_heads": 0, "min_ffn": 0},
        {"backbone_ratio": 0.4, "allocation": "query_heads", "model": model},
        {"backbone_ratio": 0.4, "allocation": "search", "model": model},
        {"rates": [0.5, 0.0]},
    ]
    plans = [make_plan(statistics, **demand) for demand in demands]
    for plan in plans:
        prune(model, plan, statistics, compensation="least_squares")
    assert len({plan.to_json() for plan in plans}) == len(plans)
    assert [make_plan(statistics, **demand) for demand in reversed(demands)] == plans[::-1]
    for key, block in untouched.blocks.items():
        again = statistics.blocks[key]
        assert torch.equal(again.curve.order, block.curve.order) and torch.equal(again.curve.cost, block.curve.cost)
        assert block.moments is not None and again.moments is not None and block.moments.gradients is not None
        assert torch.equal(again.moments.inputs, block.moments.inputs)
        assert again.moments.gradients is not None and torch.equal(again.moments.gradients, block.moments.gradients)


def test_unknown_criterion_names_the_near_match() -> None:
    with pytest.raises(UsageError, match="unknown criterion 'tailor' \\(did you mean 'taylor'\\?\\); allowed: "):
        collected("tailor")


def test_a_criterion_without_its_text_is_refused() -> None:
    with pytest.raises(UsageError, match="criterion taylor needs calibration text"):
        collect_statistics(tiny_llama(), criterion="taylor")


def test_other_architectures_are_refused_by_name() -> None:
    config = MistralConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    with pytest.raises(UsageError, match="'mistral' is not a Llama-shaped model"):
        collect_statistics(MistralForCausalLM(config), Calibration.from_ids(token_ids()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = value
    with pytest.raises(WorkError, match="layer 1: self_attn.v_proj.weight holds values that are not finite"):
        collect_statistics(model, Calibration.from_ids(token_ids()), criterion="wanda")


def test_a_loss_that_overflows_is_told() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(WorkError, match="lm_head.weight holds values that are not finite"):
        collect_statistics(model, Calibration.from_ids(token_ids()), criterion="taylor")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_block_without_any_activity_can_be_removed_and_refitted() -> None:
    model = tiny_llama(layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    statistics = collect_statistics(model, Calibration.from_ids(token_ids()))
    assert bool(torch.isfinite(statistics.blocks[0, "mlp"].curve.cost).all())
    plan = make_plan(statistics, backbone_ratio=0.2)
    assert all(torch.isfinite(tensor).all() for tensor in prune(model, plan, statistics, compensation="least_squares").state_dict().values())


def test_too_few_tokens_for_the_widest_ffn_are_said(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama(ffn=12)
    collect_statistics(model, Calibration.from_ids(token_ids(4, 12)), criterion="curvature")
    assert not caplog.messages  # 48 tokens, 4 for each of 12 channels
    collect_statistics(model, Calibration.from_ids(token_ids(4, 11)), criterion="curvature")
    assert len(caplog.messages) == 1
    assert "44 calibration tokens" in caplog.text and "12 channels" in caplog.text and "at least 48" in caplog.text


def replaced(path: Path, key: str, value: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))


DAMAGE = {
    "a list": lambda f: (f / "statistics.json").write_text("[]"),
    "no blocks": lambda f: replaced(f / "statistics.json", "blocks", None),
    "a block less": lambda f: replaced(f / "statistics.json", "blocks", [[0, "mlp"]]),
    "no such block": lambda f: replaced(f / "statistics.json", "blocks", [[0, "mlp"], [7, "nose"]]),
    "a layer without sizes": lambda f: replaced(f / "statistics.json", "source", {"layers": [{}]}),
    "unknown source": lambda f: replaced(f / "statistics.json", "calibration", {"seed": 0, "sources": [{"nome": 1}]}),
    "no windows": lambda f: (f / "calibration.safetensors").unlink(),
    "cut windows": lambda f: (f / "calibration.safetensors").write_bytes(b"\x10"),
    "a cut block": lambda f: (f / "layer-001.mlp.safetensors").write_bytes(b"\x10" * 30),
    "a block without a curve": lambda f: save_file({"inputs": torch.ones(3)}, f / "layer-000.attention.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_statistics_are_named(damage: str, tmp_path: Path) -> None:
    collected("curvature").save(tmp_path / "statistics")
    DAMAGE[damage](tmp_path / "statistics")
    with pytest.raises(UsageError, match=re.escape(str(tmp_path / "statistics"))):
        Statistics.load(tmp_path / "statistics")


def test_damaged_moments_are_named_when_they_are_read(tmp_path: Path) -> None:
    dense = tiny_llama()
    statistics = collect_statistics(dense, Calibration.from_ids(token_ids(8, 12)))
    plan = make_plan(statistics, backbone_ratio=0.3)
    statistics.save(tmp_path / "statistics")
    for path in (tmp_path / "statistics").glob("layer-*"):
        tensors = load_file(path)
        save_file({**tensors, "inputs": -tensors["inputs"]}, path)
    with pytest.raises(WorkError, match="the moments of (self_attn.o_proj|mlp.down_proj) are not positive definite"):
        prune(dense, plan, Statistics.load(tmp_path / "statistics"))


@pytest.mark.parametrize("seed", [20240101123456, 2**64])
def test_any_seed_makes_a_random_plan(seed: int) -> None:
    dense = tiny_llama()
    plans = [make_plan(collect_statistics(dense, criterion="random", moments=False, seed=s), ratio=0.1) for s in (seed, 1)]
    assert plans[0] != plans[1]
