"""Statistics, or a model alone, and a ratio go in; a pruning plan that meets the ratio exactly comes out."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .allocation import (
    ALLOCATION_NAMES,
    ALLOCATIONS,
    Budget,
    Key,
    allocate_layer_importance,
    allocate_per_layer,
    unit_parameters,
)
from .errors import UsageError, unknown
from .importance import CRITERIA
from .measurement import collect_statistics
from .plan import LayerPlan, ModelShape, PruningPlan
from .statistics import Statistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .query_heads import Thinned


@dataclass(frozen=True)
class Demand:
    """How much goes, and from where: what `make_plan` says of the fields it shares with this."""

    ratio: float | None = None
    backbone_ratio: float | None = None
    rates: Sequence[float] | None = None
    allocation: str | None = None
    temperature: float | None = None
    attention_share: float | None = None
    min_kv_heads: int = 1
    min_ffn: int = 1
    keep_layers: Sequence[int] = ()
    round_to: int | None = None
    bias: bool = False

    def __post_init__(self) -> None:
        if self.method not in ALLOCATION_NAMES:
            raise unknown("allocation", self.method, ALLOCATION_NAMES)
        if (self.method == "per_layer") != (self.rates is not None):
            raise UsageError("allocation per_layer and rates (one per layer) belong together")
        ratios = {"ratio": self.ratio, "backbone_ratio": self.backbone_ratio}
        given = {name: value for name, value in ratios.items() if value is not None}
        if len(given) + (self.rates is not None) != 1:
            raise UsageError("give exactly one of ratio, backbone_ratio and per-layer rates")
        for name, value in given.items():
            if not _is_number(value) or not 0 < value < 1:
                raise UsageError(f"{name}={value!r} must be a number between 0 and 1, such as 0.2")
        for name in ("min_kv_heads", "min_ffn"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name}={getattr(self, name)} must not be negative")
        for name, method in (("temperature", "layer_importance"), ("attention_share", "global")):
            if getattr(self, name) is not None and self.method != method:
                raise UsageError(f"{name} is a setting of allocation {method}, not of {self.method}: leave one out")
        if self.rates is not None and (self.keep_layers or self.round_to is not None):
            raise UsageError("keep_layers and round_to do not go with per-layer rates: rate 0 keeps a layer")
        t, share, step = self.temperature, self.attention_share, self.round_to
        if t is not None and not (_is_number(t) and 0.01 <= t < math.inf):
            raise UsageError(f"temperature={t!r} must be a number from 0.01, such as 1")
        if share is not None and not (_is_number(share) and 0 <= share <= 1):
            raise UsageError(f"attention_share={share!r} must be a number from 0 to 1, such as 0.2")
        if step is not None and (not isinstance(step, int) or step < 1):
            raise UsageError(f"round_to={step!r} must be a whole number from 1, such as 32")

    @property
    def method(self) -> str:
        """Name of the allocation."""
        return self.allocation or ("per_layer" if self.rates is not None else "global")

    def kept_layers(self, layers: int) -> list[int]:
        """`keep_layers` in a model of so many layers, from 0 and sorted; [`UsageError`] for one that is not there."""
        for index in self.keep_layers:
            if not isinstance(index, int) or not -layers <= index < layers:
                raise UsageError(
                    f"keep_layers names layer {index!r}, the model has {layers}: give numbers from {-layers} to {layers - 1}"
                )
        return sorted({index % layers for index in self.keep_layers})

    def budget(self, source: ModelShape) -> Budget:
        """The budget for a model of these sizes; [`UsageError`] where it cannot be met."""
        kept = self.kept_layers(len(source.layers))
        grown = replace(source, attention_bias=True, mlp_bias=True) if self.bias else source
        unit = {key: size for key, size in unit_parameters(grown).items() if key[0] not in kept}
        sizes = {"attention": "kv_heads", "mlp": "ffn"}
        units = {key: getattr(source.layers[key[0]], sizes[key[1]]) for key in unit}
        floor = {key: self.min_kv_heads if key[1] == "attention" else self.min_ffn for key in unit}
        attention = [key for key in unit if key[1] == "attention"]
        if not self.min_kv_heads and attention and not any(source.layers[index].kv_heads for index in kept):
            # no cache can run a model without any attention: one block keeps a group
            floor[attention[0]] = 1
        bias = {"attention": grown.attention_bias, "mlp": grown.mlp_bias}
        rest = {key: source.hidden_size * (2 if bias[key[1]] else 1) for key in unit}
        lot = self.round_to or 1
        spare = {key: width % lot for key, width in units.items() if key[1] == "mlp"}
        forced = sum(count * unit[key] for key, count in spare.items())
        for key in spare:
            width, least = units[key], min(floor[key], units[key])
            units[key], floor[key], unit[key] = width // lot, math.ceil(least / lot), lot * unit[key]
            if units[key] < max(1, floor[key]):
                raise UsageError(
                    f"layer {key[0]}: FFN width {width} leaves no multiple of round_to={lot} with min_ffn={self.min_ffn}: "
                    "lower --round-to or --min-ffn, or keep the layer with --keep-layers"
                )
        cost = source.cost
        if self.backbone_ratio is not None:
            target = self.backbone_ratio * cost.backbone_parameters
        else:
            target = (self.ratio or 0.0) * cost.parameters
        added = grown.cost.parameters - cost.parameters
        share = None if self.attention_share is None else self.attention_share * target
        budget = Budget(source, target + added - forced, unit, units, floor, rest, lot, spare, share)
        if self.rates is None:
            self._check_possible(budget, target, forced - added, kept)
        return budget

    def describe(self, source: ModelShape) -> str:
        """The allocation as a plan names it: its method, and what it was told beyond floors and ratio."""
        kept = self.kept_layers(len(source.layers))
        told = {
            f"temperature {self.temperature}": self.temperature is not None,
            f"attention share {self.attention_share}": self.attention_share is not None,
            f"layers kept: {', '.join(map(str, kept))}": bool(kept),
            f"FFN widths in multiples of {self.round_to}": self.round_to is not None,
            "biases added": self.bias,
        }
        settings = "; ".join(text for text, is_set in told.items() if is_set)
        return f"{self.method} ({settings})" if settings else self.method

    def _check_possible(self, budget: Budget, target: float, forced: int, kept: list[int]) -> None:
        name = "ratio" if self.ratio is not None else "backbone_ratio"
        value, flag = getattr(self, name), f"--{name.replace('_', '-')}"
        total = target / value
        most = budget.most() + forced
        if target > most:
            limits = [f"min_kv_heads={self.min_kv_heads}", f"min_ffn={self.min_ffn}"]
            limits += [f"round_to={self.round_to}"] if self.round_to else []
            limits += [f"layers {', '.join(map(str, kept))} kept"] if kept else []
            flags = [flag, "--min-kv-heads", "--min-ffn"]
            flags += ["--round-to"] if self.round_to else []
            raise UsageError(
                f"{name}={value} removes more than the layers hold with {_listed(limits, 'and')} "
                f"(at most {_down(most / total)}): lower {_listed(flags, 'or')}"
                + (", or keep fewer layers" if kept else "")
            )
        if target < forced:
            raise UsageError(
                f"{name}={value} removes less than round_to={self.round_to} takes from the FFN widths of this model "
                f"(at least {_up(forced / total)}): raise {flag} or lower --round-to"
            )
        if budget.attention is not None:
            least_share = max(0.0, 1 - (budget.most(["mlp"]) + forced) / target)
            most_share = min(1 - forced / target, budget.most(["attention"]) / target)
            if not least_share <= budget.attention / target <= most_share:
                raise UsageError(
                    f"attention_share={self.attention_share} with {name}={value}: the blocks hold enough for a share from "
                    f"{_up(least_share)} to {_down(most_share)}: change --attention-share or lower {flag}"
                )


def make_plan(
    statistics: Statistics | None = None,
    *,
    model: PreTrainedModel | str | os.PathLike[str] | None = None,
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
    searched, thinned = demand.method == "search", demand.method == "query_heads"
    if (searched or thinned) and (statistics is None or model is None or isinstance(model, (str, os.PathLike))):
        raise UsageError(f"allocation {demand.method} needs statistics, and the loaded model that they were collected on")
    if statistics is None:
        statistics = _uncalibrated(model, criterion, seed)
    elif criterion not in (None, statistics.criterion):
        raise UsageError(f"the statistics were collected for criterion {statistics.criterion}, not {criterion}")
    budget = demand.budget(statistics.source)
    heads: dict[int, Thinned] = {}
    if rates is not None:
        removed = allocate_per_layer(budget, rates)
    elif layer_scores is not None:
        removed = allocate_layer_importance(budget, layer_scores, 1.0 if temperature is None else temperature)
    else:
        costs = {key: budget.in_lots(key, statistics.blocks[key].curve.cost) for key in budget.units}
        if thinned:
            from .query_heads import allocate_query_heads, options_of

            options = options_of(model, statistics, {layer for layer, kind in budget.units if kind == "attention"})
            removed, heads = allocate_query_heads(budget, costs, options)
        else:
            removed = ALLOCATIONS["global" if searched else demand.method](budget, costs)
    if searched:
        from .search import refine

        removed = refine(model, statistics, budget, removed)
    plan = plan_of(statistics, budget.unpacked(removed), demand.describe(statistics.source), heads)
    return replace(plan, attention_bias=True, mlp_bias=True) if bias else plan


def plan_of(
    statistics: Statistics, removed: dict[Key, int], allocation: str, heads: Mapping[int, Thinned] | None = None
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
        if heads and index in heads:
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


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _down(value: float) -> float:
    """Rounded down to the four decimals that are printed, so that what is called possible is."""
    return math.floor(1e4 * value) / 1e4


def _up(value: float) -> float:
    return math.ceil(1e4 * value) / 1e4


def _listed(words: list[str], last: str) -> str:
    return f"{', '.join(words[:-1])} {last} {words[-1]}"


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


def load_for_planning(path: str | os.PathLike[str], *, weights: bool = True) -> PreTrainedModel:
    """A model with its weights, or, where chance decides, on the meta device from its config alone."""
    from .layerwise import skeleton
    from .trainer.models import load_config, load_model, local_folder

    folder = local_folder(os.fspath(path))
    return load_model(folder) if weights else skeleton(load_config(folder))
