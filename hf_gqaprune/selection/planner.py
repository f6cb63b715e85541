"""Statistics, or a model alone, and a ratio go in; a pruning plan that meets the ratio exactly comes out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..checkpoint import ModelFolder, resolve_model
from ..errors import UsageError, unknown
from ..models import Key, ModelShape, skeleton
from ..plan import LayerPlan, PruningPlan
from ..statistics import CRITERIA, Statistics, collect_statistics
from .allocation import ALLOCATIONS, MEASURING, AllocationInputs
from .budget import Demand
from .query_heads import QueryHeadOption
from .rates import allocate_per_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def make_plan(
    statistics: Statistics | None = None,
    *,
    model: PreTrainedModel | ModelFolder | str | os.PathLike[str] | None = None,
    ratio: float | None = None,
    backbone_ratio: float | None = None,
    rates: Sequence[float] | None = None,
    criterion: str | None = None,
    allocation: str | None = None,
    layer_scores: Sequence[float] | None = None,
    temperature: float | None = None,
    attention_share: float | None = None,
    min_kv_heads: int = 1,
    min_ffn: int = 1,
    keep_layers: Sequence[int] = (),
    round_to: int | None = None,
    bias: bool = False,
    seed: int = 0,
) -> PruningPlan:
    """Choose which units to keep.

    Args:
        statistics: removal curves of a calibration pass; without them `model` is needed and a criterion that needs no
            calibration (`magnitude`, `magnitude_l1`, `random`).
        model: without statistics: a model, or a path or Hub id to load one from; `random` needs no weights and takes one
            on the meta device. With allocation `search` or `query_heads`: the model that was measured, left as it was.
        ratio: fraction of all parameters to remove, between 0 and 1.
        backbone_ratio: fraction of the decoder layers' parameters, norms included; exactly one of both.
        rates: with `allocation="per_layer"` instead of a ratio: one fraction per layer.
        criterion: a key of `importance.CRITERIA`; by default that of the statistics.
        allocation: `global` (default), `query_heads` (layers may also lose the same number of query heads from every
            group, see `query_heads`), `search` (from `global` on, by measured divergence, see `search.refine`),
            `uniform`, `layer_importance` or `per_layer` (default when `rates` are given).
        layer_scores: with `allocation="layer_importance"`: importance per layer, from `layer_importance.measure`.
        temperature: with `allocation="layer_importance"`: from 0.01 (the least important layers bear everything) over 1
            (default) upwards (all rates alike).
        attention_share: with `allocation="global"`: fraction of the removed parameters that attention blocks give, met to
            half a KV group; None: by cost.
        min_kv_heads, min_ffn: what every block must keep; 0 lets whole blocks go.
        keep_layers: layers that stay untouched, counted from 0, or from the end with -1.
        round_to: FFN widths become multiples of this many channels, except in kept layers.
        bias: every linear of the pruned model has a bias, for compensation `bias`; these count, and so more goes.
        seed: for the criterion `random`.

    Returns:
        The plan; its parameters are within half an FFN channel (half of `round_to` channels) of the request, of all
        allocations with a ratio alike, as long as any FFN channel is left to trade.

    Raises:
        UsageError: no ratio or two, one outside (0, 1) or above what floors and kept layers leave; unknown names;
            settings of another allocation; layers that are not there.
    """
    demand = Demand(
        ratio=ratio,
        backbone_ratio=backbone_ratio,
        rates=rates,
        allocation=allocation,
        temperature=temperature,
        attention_share=attention_share,
        min_kv_heads=min_kv_heads,
        min_ffn=min_ffn,
        keep_layers=keep_layers,
        round_to=round_to,
        bias=bias,
    )
    if (demand.method == "layer_importance") != (layer_scores is not None):
        raise UsageError("allocation layer_importance and layer_scores (see layer_importance.measure) belong together")
    if criterion is not None and criterion not in CRITERIA:
        raise unknown("criterion", criterion, CRITERIA)
    unloaded = model is None or isinstance(model, (str, os.PathLike))
    if demand.method in MEASURING and (statistics is None or unloaded):
        raise UsageError(f"allocation {demand.method} needs statistics, and the loaded model that they were collected on")
    if statistics is None:
        statistics = _uncalibrated(model, criterion, seed)
    elif criterion not in (None, statistics.criterion):
        raise UsageError(f"the statistics were collected for criterion {statistics.criterion}, not {criterion}")
    budget = demand.budget(statistics.source)
    inputs = AllocationInputs(
        statistics,
        model,
        () if rates is None else rates,
        () if layer_scores is None else layer_scores,
        temperature,
    )
    allocated = ALLOCATIONS[demand.method](budget, inputs)
    plan = plan_of(statistics, budget.unpacked(allocated.removed), demand.describe(statistics.source), allocated.heads)
    return replace(plan, attention_bias=True, mlp_bias=True) if bias else plan


def plan_of(
    statistics: Statistics, removed: dict[Key, int], allocation: str, heads: Mapping[int, QueryHeadOption]
) -> PruningPlan:
    """The plan that removes the first `removed[block]` units of every block's curve; other blocks stay whole.

    The groups of layers in `heads` are what that says.
    """
    source = statistics.source
    layers = []
    for index, shape in enumerate(source.layers):
        kept: dict[str, Sequence[int]] = {"attention": (), "mlp": ()}
        for kind in kept:
            if (index, kind) in statistics.blocks:
                order = statistics.blocks[index, kind].curve.order
                kept[kind] = order[removed.get((index, kind), 0) :].tolist()
        if index in heads:
            layers.append(heads[index].kept(removed[index, "attention"], tuple(sorted(kept["mlp"]))))
        else:
            layers.append(LayerPlan.of_groups(shape, kept["attention"], kept["mlp"]))
    return PruningPlan(
        source, tuple(layers), statistics.criterion, allocation, source.attention_bias, source.mlp_bias
    )


def check_budget(source: ModelShape, demand: Demand) -> None:
    """Raise [`UsageError`] for what `make_plan` would refuse of a model of these sizes, without its weights."""
    budget = demand.budget(source)
    if demand.rates is not None:
        allocate_per_layer(budget, demand.rates)


def _uncalibrated(model: Any, criterion: str | None, seed: int) -> Statistics:
    if model is None:
        raise UsageError("make_plan needs statistics or a model")
    name = criterion or "magnitude"
    if CRITERIA[name].calibrated:
        raise UsageError(f"criterion {name} needs statistics: collect_statistics(model, calibration, criterion={name!r})")
    if isinstance(model, (str, os.PathLike)):
        model = load_for_planning(model, weights=name != "random")
    if name != "random" and any(p.device.type == "meta" for p in model.parameters()):
        raise UsageError(f"criterion {name} reads weights, and this model has none (meta device): use criterion random")
    return collect_statistics(model, None, criterion=name, moments=False, seed=seed)


def load_for_planning(model: str | os.PathLike[str] | ModelFolder, *, weights: bool = True) -> PreTrainedModel:
    """A model with its weights, or, where chance decides, on the meta device from its config alone."""
    folder = resolve_model(model)
    return folder.load() if weights else skeleton(folder.config)
