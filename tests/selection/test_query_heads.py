"""Query heads taken from every group: prices by brute force, budgets, and heads that nobody misses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.costs import refit_cost
from support.tiny import tiny_llama, token_ids

from hf_gqaprune import Calibration, PruningPlan, Statistics, collect_statistics, make_plan, prune
from hf_gqaprune.cli import main
from hf_gqaprune.dependency_graph import trace_units
from hf_gqaprune.errors import UsageError
from hf_gqaprune.models.shapes import LayerShape
from hf_gqaprune.selection.query_heads import options_of, query_head_options

IDS = token_ids(24, 12)


def measured(**shape: Any) -> tuple[Any, Statistics]:
    model = tiny_llama(**({"kv_heads": 3, "n_rep": 3, "ffn": 24, "layers": 2} | shape))
    return model, collect_statistics(model, Calibration.from_ids(IDS))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 3), st.sampled_from([2, 4]))
def test_prices_are_those_of_an_explicit_refit(seed: int, kv_heads: int, n_rep: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = kv_heads * n_rep * width

    def positive(size: int) -> torch.Tensor:
        x = torch.randn(size + 3, size, generator=generator, dtype=torch.float64)
        return x.T @ x / size + 0.1 * torch.eye(size, dtype=torch.float64)

    h, g = positive(n), positive(4)
    weight = torch.randn(4, n, generator=generator, dtype=torch.float64)
    (slices,) = trace_units((LayerShape(kv_heads * n_rep, kv_heads, 2, width),))
    columns = torch.arange(n).view(-1, width)

    def cost(heads: torch.Tensor) -> float:
        return refit_cost(weight, h, g, columns[heads].flatten().tolist())

    options = list(query_head_options(h, weight.T @ g @ weight, slices))
    assert [option.heads.shape for option in options] == [(kv_heads, n_rep - taken) for taken in range(n_rep)]
    for option in options:
        assert (option.heads // n_rep == torch.arange(kv_heads)[:, None]).all()
        assert option.start == pytest.approx(cost(option.heads.flatten()), rel=1e-6, abs=1e-9)
        for gone in range(1, kv_heads + 1):
            heads = option.heads[option.order[gone:]].flatten()
            assert option.start + float(option.cost[gone - 1]) == pytest.approx(cost(heads), rel=1e-6, abs=1e-9)
    for before, after in zip(options, options[1:], strict=False):
        assert set(after.heads.flatten().tolist()) < set(before.heads.flatten().tolist())
    if n_rep > 1 and kv_heads == 1:
        every = options[0].heads[0]
        singles = [cost(every[every != head]) for head in every]
        assert options[1].start == pytest.approx(min(singles), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    "demand",
    [
        {"backbone_ratio": 0.2},
        {"ratio": 0.2, "round_to": 4, "keep_layers": [0]},
        {"backbone_ratio": 0.7},
        {"backbone_ratio": 0.6, "min_kv_heads": 0, "min_ffn": 0},
        {"backbone_ratio": 0.25, "min_kv_heads": 3},
    ],
)
@pytest.mark.parametrize("biased", [False, True])
def test_the_budget_is_met_and_every_group_is_alike(demand: dict[str, Any], biased: bool) -> None:
    model, statistics = measured(attention_bias=biased, mlp_bias=biased)
    plan = make_plan(statistics, model=model, allocation="query_heads", **demand)
    name = "ratio" if "ratio" in demand else "backbone_ratio"
    whole = plan.before.parameters if name == "ratio" else plan.before.backbone_parameters
    channel = (3 * model.config.hidden_size + 2) * demand.get("round_to", 1)
    assert abs(getattr(plan, name) - demand[name]) * whole <= channel / 2 + 1
    assert plan.allocation.startswith("query_heads")
    if demand.get("min_kv_heads") == 3:
        assert all(len(layer.kv_groups) == 3 for layer in plan.layers)
        assert any(len(layer.query_heads) < 9 for layer in plan.layers)
    pruned = prune(model, plan, statistics, compensation="least_squares")
    assert pruned.num_parameters() == plan.after.parameters
    assert bool(torch.isfinite(pruned(IDS[:2]).logits).all())
    assert make_plan(statistics, model=model, allocation="query_heads", **demand).to_json() == plan.to_json()


def test_heads_that_lead_nowhere_are_the_first_to_go() -> None:
    """Query heads 1, 3 and 8 (of groups 0, 1 and 2) of layer 1 have no way out."""
    model = tiny_llama(kv_heads=3, n_rep=3, ffn=24, layers=2)
    with torch.no_grad():
        for head in (1, 3, 8):
            model.model.layers[1].self_attn.o_proj.weight[:, head * 8 : head * 8 + 8] = 0
    statistics = collect_statistics(model, Calibration.from_ids(IDS))
    size = 3 * 2 * 8 * model.config.hidden_size
    share = size / statistics.source.cost.backbone_parameters
    plan = make_plan(statistics, model=model, backbone_ratio=share, allocation="query_heads")
    assert plan.layers[0] == PruningPlan.keep_all(model.config).layers[0]
    assert plan.layers[1].query_heads == (0, 2, 4, 5, 6, 7)
    assert plan.layers[1].kv_groups == (0, 1, 2) and len(plan.layers[1].ffn_channels) == 24
    with torch.no_grad():
        given = prune(model, plan, compensation="none")(IDS).logits
        torch.testing.assert_close(given, model(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [{"n_rep": 1, "kv_heads": 6}, {"n_rep": 4, "kv_heads": 4}])
@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6])
def test_the_price_is_no_higher_than_with_groups_alone(shape: dict[str, int], ratio: float) -> None:
    model, statistics = measured(ffn=96, layers=3, **shape)
    options = options_of(model, statistics, {0, 1, 2})

    def price(plan: PruningPlan) -> float:
        total = 0.0
        for index, (shape, kept) in enumerate(zip(plan.source.layers, plan.layers, strict=True)):
            option = options[index][shape.n_rep - len(kept.query_heads) // len(kept.kv_groups)]
            total += option.start
            curves = ((option.cost, len(kept.kv_groups)), (statistics.blocks[index, "mlp"].curve.cost, len(kept.ffn_channels)))
            total += sum(float(cost[len(cost) - left - 1]) for cost, left in curves if left < len(cost))
        return total

    default = make_plan(statistics, backbone_ratio=ratio)
    found = make_plan(statistics, model=model, backbone_ratio=ratio, allocation="query_heads")
    # but for the rounding of both to a channel
    assert price(found) <= 1.005 * price(default)
    if shape["n_rep"] == 1:
        assert all(layer.query_heads == layer.kv_groups for layer in found.layers)


def test_what_it_needs_is_said(tmp_path: Path, llama: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model, statistics = measured()
    demand: dict[str, Any] = {"backbone_ratio": 0.3, "allocation": "query_heads"}
    with pytest.raises(UsageError, match="allocation query_heads needs statistics, and the loaded model"):
        make_plan(statistics, **demand)
    calibration = Calibration.from_ids(IDS)
    with pytest.raises(UsageError, match="requires criterion curvature, and the statistics are for taylor"):
        make_plan(collect_statistics(model, calibration, criterion="taylor"), model=model, **demand)
    with pytest.raises(UsageError, match="allocation query_heads needs statistics with moments"):
        make_plan(collect_statistics(model, calibration, moments=False), model=model, **demand)
    with pytest.raises(UsageError, match="attention_share is a setting of allocation global, not of query_heads"):
        make_plan(statistics, model=model, attention_share=0.2, **demand)
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    line = ["plan", str(tmp_path / "model"), "--backbone-ratio", "0.6", "--allocation", "query_heads"]
    line += ["--calibration", str(tmp_path / "text.txt"), "--samples", "16", "--seq-len", "32"]
    capsys.readouterr()
    assert main([*line, "--criterion", "taylor", "-o", str(tmp_path / "plan.json")]) == 2
    assert "prices by criterion curvature, not taylor: leave --criterion out" in capsys.readouterr().err
    assert main([*line, "-o", str(tmp_path / "plan.json")]) == 0
    assert PruningPlan.load(tmp_path / "plan.json").allocation == "query_heads"
