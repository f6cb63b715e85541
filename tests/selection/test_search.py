"""The search keeps the budget, never ends worse than it began, and measures what a pruned model really does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.tiny import tiny_llama, token_ids

from hf_gqaprune import Calibration, PruningPlan, Statistics, collect_statistics, make_plan, prune
from hf_gqaprune.configuration import PruningConfig
from hf_gqaprune.errors import UsageError, WorkError
from hf_gqaprune.selection.budget import make_budget
from hf_gqaprune.selection.search import _Candidate, _Target

SHAPE: dict[str, Any] = {"layers": 3, "kv_heads": 4, "ffn": 24}


def measured(windows: int = 40, **changes: Any) -> tuple[Any, Statistics]:
    model = tiny_llama(**(SHAPE | changes))
    return model, collect_statistics(model, Calibration.from_ids(token_ids(windows, 12)))


def divergence(model: Any, pruned: Any, ids: torch.Tensor) -> float:
    """KL(dense || pruned) over the whole vocabulary, nats per token."""
    with torch.no_grad():
        wanted, given = (m(ids).logits.double().log_softmax(-1) for m in (model, pruned))
    return float((wanted.exp() * (wanted - given)).sum() / ids.numel())


def refitted(model: Any, plan: PruningPlan, statistics: Statistics) -> Any:
    """Pruned, each output projection re-fitted by itself."""
    plain = Statistics(statistics.source, statistics.criterion, statistics.blocks)
    return prune(model, plan, plain, compensation="least_squares")


@pytest.mark.parametrize(
    ("shape", "demand"),
    [
        ({}, {"backbone_ratio": 0.4}),
        ({"attention_bias": True, "mlp_bias": True}, {"backbone_ratio": 0.5, "min_kv_heads": 0, "min_ffn": 0}),
        ({"n_rep": 3}, {"ratio": 0.3, "round_to": 4, "keep_layers": [0]}),
    ],
)
def test_the_search_meets_the_budget_and_is_never_worse(shape: dict[str, Any], demand: dict[str, Any]) -> None:
    model, statistics = measured(**shape)
    before = copy.deepcopy(model.state_dict())
    start = make_plan(statistics, **demand)
    found = make_plan(statistics, model=model, allocation="search", **demand)
    budget = make_budget(PruningConfig(**demand), statistics.source)
    half = max(size for key, size in budget.unit.items() if key[1] == "mlp") / 2
    wanted = start.source.cost.parameters - start.target.cost.parameters
    assert abs(start.source.cost.parameters - found.target.cost.parameters - wanted) <= 2 * half
    assert "search" in found.allocation
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    if 0 in demand.get("keep_layers", ()):
        assert found.layers[0] == PruningPlan.keep_all(model.config).layers[0]
    ids = statistics.calibration.held_out
    ends = [divergence(model, refitted(model, plan, statistics), ids) for plan in (start, found)]
    assert ends[1] <= ends[0] * (1 + 1e-5)


def test_a_bad_start_is_left_behind() -> None:
    """Two blocks do nothing, and the curves are told that they do everything."""
    model = tiny_llama(**SHAPE)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    statistics = collect_statistics(model, Calibration.from_ids(token_ids(40, 12)))
    curve = statistics.blocks[1, "mlp"].curve
    curve.cost.copy_(torch.linspace(1e3, 1e4, len(curve.cost), dtype=curve.cost.dtype))
    start = make_plan(statistics, backbone_ratio=0.3)
    found = make_plan(statistics, model=model, backbone_ratio=0.3, allocation="search")
    assert len(start.layers[1].ffn_channels) == 24
    assert len(found.layers[1].ffn_channels) < 12
    ids = statistics.calibration.held_out
    ends = [divergence(model, refitted(model, plan, statistics), ids) for plan in (start, found)]
    assert ends[1] < 0.9 * ends[0]


def test_a_masked_candidate_is_the_pruned_model() -> None:
    model, statistics = measured(attention_bias=True, mlp_bias=True)
    dense = copy.deepcopy(model)
    demand = PruningConfig(backbone_ratio=0.5, min_kv_heads=0, min_ffn=0)
    plan = make_plan(statistics, backbone_ratio=0.5, min_kv_heads=0, min_ffn=0)
    pruned = refitted(dense, plan, statistics)
    ids = statistics.calibration.held_out
    candidate = _Candidate(model, statistics, make_budget(demand, statistics.source))
    for index, kept in enumerate(plan.layers):
        candidate.mask((index, "attention"), 4 - len(kept.kv_groups))
        candidate.mask((index, "mlp"), 24 - len(kept.ffn_channels))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, pruned(ids).logits, rtol=1e-4, atol=1e-5)
        # a vocabulary of 48 lies within the top: the divergence is the whole one
        target = _Target.of(dense, ids)
        assert target.divergence(model) / ids.numel() == pytest.approx(divergence(dense, pruned, ids), rel=1e-3)
    candidate.restore()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


def test_what_the_search_needs_is_said() -> None:
    model, statistics = measured()
    with pytest.raises(UsageError, match="loaded model"):
        make_plan(statistics, backbone_ratio=0.3, allocation="search")
    _, few = measured(windows=7)
    with pytest.raises(UsageError, match="8 windows or more"):
        make_plan(few, model=model, backbone_ratio=0.3, allocation="search")
    bare = collect_statistics(model, Calibration.from_ids(token_ids(40, 12)), moments=False)
    with pytest.raises(UsageError, match="with moments"):
        make_plan(bare, model=model, backbone_ratio=0.3, allocation="search")


def test_an_overflow_is_named_and_the_model_comes_back() -> None:
    model, statistics = measured()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.inf)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(WorkError, match="from the dense model is nan"):
        make_plan(statistics, model=model, backbone_ratio=0.3, allocation="search")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
