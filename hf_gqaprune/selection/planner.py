"""Make the plan that removes a given fraction of a model's parameters."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..checkpoint import resolve_model
from ..configuration import PruningConfig
from ..errors import UsageError
from ..models import Key, ModelShape, empty_model
from ..plan import LayerPlan, PruningPlan
from ..statistics import CRITERIA, Statistics, collect_statistics
from .allocation import ALLOCATIONS, MEASURING, AllocationInputs
from .budget import Budget, describe, make_budget
from .query_heads import QueryHeadOption
from .rates import allocate_per_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def make_plan(
    statistics: Statistics | None = None,
    config: PruningConfig | None = None,
    *,
    model: PreTrainedModel | str | os.PathLike[str] | None = None,
    layer_scores: Sequence[float] | None = None,
    seed: int = 0,
    **fields: Any,
) -> PruningPlan:
    """Choose which units to keep.

    Args:
        statistics: removal curves of a calibration pass; without them `model` is needed and a criterion that needs no
            calibration (`magnitude`, `magnitude_l1`, `random`).
        config: how much to remove and from where, or None and its `fields`: `make_plan(statistics, ratio=0.2)`. Of
            `compensation` only `bias` matters here, whose biases count; `memory`, `device` and `dtype` belong to commands.
        model: without statistics: a model, or a path or Hub id to load one from; `random` needs no weights and takes one
            on the meta device. With allocation `search` or `query_heads`: the model that was measured, left as it was.
        layer_scores: with allocation `layer_importance`: importance per layer, from `layer_importance.measure_layers`.
        seed: for the criterion `random`.

    Returns:
        The plan; its parameters are within half an FFN channel (half of `round_to` channels) of the request, for every
        allocation with a ratio, as long as any FFN channel is left to trade.

    Raises:
        UsageError: no ratio or two, one outside (0, 1) or above what floors and kept layers leave; unknown names;
            settings of another allocation; layers that the model does not have.
    """
    config = PruningConfig(**fields) if config is None else replace(config, **fields)
    if any(value is not None for value in (config.memory, config.device, config.dtype)):
        raise UsageError("memory, device and dtype belong to plan_model and prune_model: make_plan takes a model as it is")
    if (config.method == "layer_importance") != (layer_scores is not None):
        raise UsageError("allocation='layer_importance' requires layer_scores from measure_layers, and vice versa")
    if config.method in MEASURING and (statistics is None or model is None or isinstance(model, (str, os.PathLike))):
        raise UsageError(f"allocation {config.method} needs statistics, and the loaded model that they were collected on")
    if statistics is None:
        statistics = _uncalibrated(model, config.criterion, seed)
    elif config.criterion not in (None, statistics.criterion):
        raise UsageError(f"the statistics were collected for criterion {statistics.criterion}, not {config.criterion}")
    budget = make_budget(config, statistics.source)
    inputs = AllocationInputs(statistics, model, config.rates or (), layer_scores or (), config.temperature)
    allocated = ALLOCATIONS[config.method](budget, inputs)
    name = describe(config, statistics.source)
    removed = budget.unpacked(allocated.removed)
    for (index, kind), count in removed.items():
        logger.info("layer %d %s: removes %d of %d units", index, kind, count, len(statistics.blocks[index, kind].curve.order))
    plan = plan_of(statistics, removed, name, allocated.heads)
    return replace(plan, attention_bias=True, mlp_bias=True) if config.adds_biases else plan


def plan_of(
    statistics: Statistics, removed: dict[Key, int], allocation: str, heads: Mapping[int, QueryHeadOption]
) -> PruningPlan:
    """Make the plan that removes the first `removed[block]` units of every block's curve; other blocks stay whole.

    In layers that `heads` names, the option decides which KV groups and query heads are kept.
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


def check_budget(config: PruningConfig, source: ModelShape) -> Budget:
    """Compute the budget and refuse, without reading weights, what `make_plan` would refuse of a model of these sizes."""
    budget = make_budget(config, source)
    if config.rates is not None:
        allocate_per_layer(budget, config.rates)
    return budget


def _uncalibrated(model: Any, criterion: str | None, seed: int) -> Statistics:
    if model is None:
        raise UsageError("make_plan needs statistics or a model")
    name = criterion or "magnitude"
    if CRITERIA[name].calibrated:
        raise UsageError(f"criterion {name} needs statistics: collect_statistics(model, calibration, criterion={name!r})")
    if isinstance(model, (str, os.PathLike)):
        folder = resolve_model(model)
        model = empty_model(folder.config) if name == "random" else folder.load()
    if name != "random" and any(p.device.type == "meta" for p in model.parameters()):
        raise UsageError(f"criterion {name} reads weights, and this model has none (meta device): use criterion random")
    return collect_statistics(model, None, criterion=name, moments=False, seed=seed)
