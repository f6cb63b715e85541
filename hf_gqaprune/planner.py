"""Statistics, or a model alone, and a ratio go in; a pruning plan that meets the ratio exactly comes out."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .allocation import ALLOCATION_NAMES, ALLOCATIONS, Budget, Key, allocate_per_layer, unit_parameters
from .errors import UsageError, unknown
from .importance import CRITERIA
from .plan import LayerPlan, ModelShape, PruningPlan
from .statistics import Statistics, collect_statistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def make_plan(
    statistics: Statistics | None = None,
    *,
    model: PreTrainedModel | str | os.PathLike[str] | None = None,
    ratio: float | None = None,
    backbone_ratio: float | None = None,
    rates: Sequence[float] | None = None,
    criterion: str | None = None,
    allocation: str | None = None,
    min_kv_heads: int = 1,
    min_ffn: int = 1,
    seed: int = 0,
) -> PruningPlan:
    """Choose which units to keep.

    Args:
        statistics: removal curves of a calibration pass; without them `model` is needed and a criterion that needs no
            calibration (`magnitude`, `magnitude_l1`, `random`).
        model: a model, or a path or Hub id to load one from; `random` needs no weights and takes one on the meta device.
        ratio: fraction of all parameters to remove, between 0 and 1.
        backbone_ratio: fraction of the decoder layers' parameters, norms included; exactly one of both.
        rates: with `allocation="per_layer"` instead of a ratio: one fraction per layer.
        criterion: a key of `importance.CRITERIA`; by default that of the statistics.
        allocation: `global` (default), `uniform` or `per_layer` (default when `rates` are given).
        min_kv_heads, min_ffn: what every block must keep; 0 lets whole blocks go.
        seed: for the criterion `random`.

    Returns:
        The plan; its parameters are within half an FFN channel of the request, of `uniform` and `global` alike, as long
        as any FFN channel is left to trade.

    Raises:
        UsageError: no ratio or two, one outside (0, 1) or above what the floors leave; unknown names.
    """
    allocation = allocation or ("per_layer" if rates is not None else "global")
    if allocation not in ALLOCATION_NAMES:
        raise unknown("allocation", allocation, ALLOCATION_NAMES)
    if criterion is not None and criterion not in CRITERIA:
        raise unknown("criterion", criterion, CRITERIA)
    check_ratio(ratio, backbone_ratio, rates, allocation)
    if statistics is None:
        statistics = _uncalibrated(model, criterion, seed)
    elif criterion not in (None, statistics.criterion):
        raise UsageError(f"the statistics were collected for criterion {statistics.criterion}, not {criterion}")
    budget = _budget(statistics.source, ratio, backbone_ratio, min_kv_heads, min_ffn)
    costs = {key: block.curve.cost for key, block in statistics.blocks.items()}
    if rates is not None:
        removed = allocate_per_layer(budget, rates)
    else:
        _check_possible(budget, ratio, backbone_ratio, min_kv_heads, min_ffn)
        removed = ALLOCATIONS[allocation](budget, costs)
    return plan_of(statistics, removed, allocation)


def plan_of(statistics: Statistics, removed: dict[Key, int], allocation: str) -> PruningPlan:
    """The plan that removes the first `removed[block]` units of every block's curve."""
    source = statistics.source
    layers = []
    for index, shape in enumerate(source.layers):
        kept: dict[str, Sequence[int]] = {"attention": (), "mlp": ()}
        for kind in kept:
            if (index, kind) in statistics.blocks:
                order = statistics.blocks[index, kind].curve.order
                kept[kind] = order[removed[index, kind] :].tolist()
        layers.append(LayerPlan.of_groups(shape, kept["attention"], kept["mlp"]))
    return PruningPlan(
        source, tuple(layers), statistics.criterion, allocation, source.attention_bias, source.mlp_bias
    )


def check_ratio(
    ratio: Any, backbone_ratio: Any, rates: Sequence[float] | None = None, allocation: str | None = None
) -> None:
    """Raise [`UsageError`] unless exactly one valid ratio, or `per_layer` rates alone, are given."""
    if (allocation == "per_layer") != (rates is not None):
        raise UsageError("allocation per_layer and rates (one per layer) belong together")
    given = [(n, v) for n, v in (("ratio", ratio), ("backbone_ratio", backbone_ratio)) if v is not None]
    if len(given) + (rates is not None) != 1:
        raise UsageError("give exactly one of ratio, backbone_ratio and per-layer rates")
    for name, value in given:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
            raise UsageError(f"{name}={value!r} must be a number between 0 and 1, such as 0.2")


def check_budget(
    source: ModelShape,
    *,
    ratio: float | None = None,
    backbone_ratio: float | None = None,
    rates: Sequence[float] | None = None,
    allocation: str = "global",
    min_kv_heads: int = 1,
    min_ffn: int = 1,
) -> None:
    """Raise [`UsageError`] for what `make_plan` would refuse of a model of these sizes, without its weights."""
    if allocation not in ALLOCATION_NAMES:
        raise unknown("allocation", allocation, ALLOCATION_NAMES)
    check_ratio(ratio, backbone_ratio, rates, allocation)
    budget = _budget(source, ratio, backbone_ratio, min_kv_heads, min_ffn)
    if rates is not None:
        allocate_per_layer(budget, rates)
    else:
        _check_possible(budget, ratio, backbone_ratio, min_kv_heads, min_ffn)


def _budget(
    source: ModelShape, ratio: float | None, backbone_ratio: float | None, min_kv_heads: int, min_ffn: int
) -> Budget:
    for name, value in (("min_kv_heads", min_kv_heads), ("min_ffn", min_ffn)):
        if value < 0:
            raise UsageError(f"{name}={value} must not be negative")
    cost = source.cost
    if backbone_ratio is not None:
        target = backbone_ratio * cost.backbone_parameters
    else:
        target = (ratio or 0.0) * cost.parameters
    unit = unit_parameters(source)
    sizes = {"attention": "kv_heads", "mlp": "ffn"}
    units = {key: getattr(source.layers[key[0]], sizes[key[1]]) for key in unit}
    floor = {key: min_kv_heads if key[1] == "attention" else min_ffn for key in unit}
    attention = [key for key in unit if key[1] == "attention"]
    if not min_kv_heads and attention:
        # no cache can run a model without any attention: one block keeps a group
        floor[attention[0]] = 1
    bias = {"attention": source.attention_bias, "mlp": source.mlp_bias}
    rest = {key: source.hidden_size * (2 if bias[key[1]] else 1) for key in unit}
    return Budget(source, target, unit, units, floor, rest)


def _check_possible(
    budget: Budget, ratio: float | None, backbone_ratio: float | None, min_kv_heads: int, min_ffn: int
) -> None:
    if budget.parameters <= budget.most:
        return
    cost = budget.shape.cost
    name, value, total = (
        ("ratio", ratio, cost.parameters)
        if ratio is not None
        else ("backbone_ratio", backbone_ratio, cost.backbone_parameters)
    )
    flag = f"--{name.replace('_', '-')}"
    possible = math.floor(1e4 * budget.most / total) / 1e4
    raise UsageError(
        f"{name}={value} removes more than the layers hold with min_kv_heads={min_kv_heads} and min_ffn={min_ffn} "
        f"(at most {possible}): lower {flag}, --min-kv-heads or --min-ffn"
    )


def _uncalibrated(model: Any, criterion: str | None, seed: int) -> Statistics:
    if model is None:
        raise UsageError("make_plan needs statistics or a model")
    name = criterion or "magnitude"
    if CRITERIA[name].calibrated:
        raise UsageError(f"criterion {name} needs statistics: collect_statistics(model, calibration, criterion={name!r})")
    if isinstance(model, (str, os.PathLike)):
        model = load_for_planning(model, name)
    if name != "random" and any(p.device.type == "meta" for p in model.parameters()):
        raise UsageError(f"criterion {name} reads weights, and this model has none (meta device): use criterion random")
    return collect_statistics(model, None, criterion=name, moments=False, seed=seed)


def load_for_planning(path: str | os.PathLike[str], criterion: str) -> PreTrainedModel:
    """A model with its weights, or, for criterion `random`, on the meta device from its config alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if criterion != "random":
        return AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
