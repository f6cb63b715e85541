"""Turn a fraction to remove into parameters, units and floors per block."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..configuration import PruningConfig
from ..errors import UsageError
from ..models import Key, ModelShape, unit_parameters


@dataclass(frozen=True)
class Budget:
    """What an allocation has to remove; its units are KV groups and lots of `lot` FFN channels, without kept layers.

    Attributes:
        shape: sizes of the model, with the biases that the plan adds.
        parameters: how many parameters to remove.
        unit: `{block: parameters of one unit}`.
        units: `{block: number of units}`.
        floor: `{block: units that must be kept}`.
        rest: parameters removed with the last unit of a block: its norm, and its output bias.
        lot: FFN channels that are only removed together.
        spare: `{FFN block: channels beyond a multiple of lot}`; always removed, and not part of `parameters`.
        attention: parameters to remove from attention blocks; None: wherever they cost least.
    """

    shape: ModelShape
    parameters: float
    unit: Mapping[Key, int]
    units: Mapping[Key, int]
    floor: Mapping[Key, int]
    rest: Mapping[Key, int]
    lot: int
    spare: Mapping[Key, int]
    attention: float | None = None

    @property
    def removable(self) -> dict[Key, int]:
        """Units that may be removed, per block."""
        return {key: max(0, count - self.floor[key]) for key, count in self.units.items()}

    def most(self, kinds: Sequence[str] = ("attention", "mlp")) -> int:
        """Return how many parameters can be removed at most."""
        return sum(self.freed(key, count) for key, count in self.removable.items() if key[1] in kinds)

    def freed(self, key: Key, count: int) -> int:
        """Return how many parameters the first `count` units of a block free."""
        return count * self.unit[key] + (self.rest[key] if count and count == self.units[key] else 0)

    def floor_or_all(self, key: Key) -> int:
        """Return how many units may be removed without the whole block."""
        return min(self.removable[key], self.units[key] - 1)

    def in_lots(self, key: Key, cost: torch.Tensor) -> torch.Tensor:
        """Sample a block's curve, float64 `(channels or groups,)`, at whole units of this budget: float64 `(units,)`."""
        if key[1] == "attention":
            return cost
        spare = self.spare[key]
        start = cost[spare - 1] if spare else 0.0
        return cost[spare + self.lot - 1 :: self.lot] - start

    def unpacked(self, removed: Mapping[Key, int]) -> dict[Key, int]:
        """Convert counts of this budget's units to KV groups and FFN channels."""
        channels = {key: self.spare[key] + self.lot * n for key, n in removed.items() if key[1] == "mlp"}
        return {**removed, **channels}


def make_budget(config: PruningConfig, source: ModelShape) -> Budget:
    """Compute what `config` removes from a model of these sizes.

    Raises:
        UsageError: no ratio is given, or floors and kept layers leave too little to remove.
    """
    if not config.budgets:
        raise UsageError("give exactly one of ratio, backbone_ratio and rates: none is given")
    kept = kept_layers(config, len(source.layers))
    grown = replace(source, attention_bias=True, mlp_bias=True) if config.adds_biases else source
    unit = {key: size for key, size in unit_parameters(grown).items() if key[0] not in kept}
    sizes = {"attention": "kv_heads", "mlp": "ffn"}
    units = {key: getattr(source.layers[key[0]], sizes[key[1]]) for key in unit}
    floor = {key: config.min_kv_heads if key[1] == "attention" else config.min_ffn for key in unit}
    attention = [key for key in unit if key[1] == "attention"]
    if not config.min_kv_heads and attention and not any(source.layers[index].kv_heads for index in kept):
        # the KV cache needs at least one attention layer
        floor[attention[0]] = 1
    bias = {"attention": grown.attention_bias, "mlp": grown.mlp_bias}
    rest = {key: source.hidden_size * (2 if bias[key[1]] else 1) for key in unit}
    lot = config.round_to or 1
    spare = {key: width % lot for key, width in units.items() if key[1] == "mlp"}
    forced = sum(count * unit[key] for key, count in spare.items())
    for key in spare:
        width, least = units[key], min(floor[key], units[key])
        units[key], floor[key], unit[key] = width // lot, math.ceil(least / lot), lot * unit[key]
        if units[key] < max(1, floor[key]):
            raise UsageError(
                f"layer {key[0]}: FFN width {width} leaves no multiple of round_to={lot} with min_ffn={config.min_ffn}: "
                "lower --round-to or --min-ffn, or keep the layer with --keep-layers"
            )
    cost = source.cost
    if config.backbone_ratio is not None:
        target = config.backbone_ratio * cost.backbone_parameters
    else:
        target = (config.ratio or 0.0) * cost.parameters
    added = grown.cost.parameters - cost.parameters
    share = None if config.attention_share is None else config.attention_share * target
    budget = Budget(grown, target + added - forced, unit, units, floor, rest, lot, spare, share)
    if config.rates is None:
        _check_possible(config, budget, target, forced - added, kept)
    return budget


def kept_layers(config: PruningConfig, layers: int) -> list[int]:
    """Resolve `keep_layers` in a model of so many layers: from 0, sorted. Raises [`UsageError`] for a layer it lacks."""
    for index in config.keep_layers:
        if not -layers <= index < layers:
            raise UsageError(
                f"keep_layers names layer {index}, the model has {layers}: give numbers from {-layers} to {layers - 1}"
            )
    return sorted({index % layers for index in config.keep_layers})


def describe(config: PruningConfig, source: ModelShape) -> str:
    """Name the allocation as a plan does: its method and the settings beyond floors and ratio."""
    kept = kept_layers(config, len(source.layers))
    notes = {
        f"temperature {config.temperature}": config.temperature is not None,
        f"attention share {config.attention_share}": config.attention_share is not None,
        f"layers kept: {', '.join(map(str, kept))}": bool(kept),
        f"FFN widths in multiples of {config.round_to}": config.round_to is not None,
        "biases added": config.adds_biases,
    }
    chosen = "; ".join(text for text, is_set in notes.items() if is_set)
    return f"{config.method} ({chosen})" if chosen else config.method


def _check_possible(config: PruningConfig, budget: Budget, target: float, forced: int, kept: list[int]) -> None:
    """Raise [`UsageError`] where the blocks hold less than `target` parameters, or fewer attention parameters than asked."""
    (name,) = config.budgets
    value, flag = getattr(config, name), f"--{name.replace('_', '-')}"
    total = target / value
    most = budget.most() + forced
    if target > most:
        limits = [f"min_kv_heads={config.min_kv_heads}", f"min_ffn={config.min_ffn}"]
        limits += [f"round_to={config.round_to}"] if config.round_to else []
        limits += [f"layers {', '.join(map(str, kept))} kept"] if kept else []
        flags = [flag, "--min-kv-heads", "--min-ffn"]
        flags += ["--round-to"] if config.round_to else []
        raise UsageError(
            f"{name}={value} removes more than the layers hold with {_joined(limits, 'and')} "
            f"(at most {_rounded_down(most / total)}): lower {_joined(flags, 'or')}"
            + (", or keep fewer layers" if kept else "")
        )
    if target < forced:
        raise UsageError(
            f"{name}={value} removes less than round_to={config.round_to} takes from the FFN widths of this model "
            f"(at least {-_rounded_down(-forced / total)}): raise {flag} or lower --round-to"
        )
    if budget.attention is not None:
        least_share = max(0.0, 1 - (budget.most(["mlp"]) + forced) / target)
        most_share = min(1 - forced / target, budget.most(["attention"]) / target)
        if not least_share <= budget.attention / target <= most_share:
            raise UsageError(
                f"attention_share={config.attention_share} with {name}={value}: the blocks hold enough for a share from "
                f"{-_rounded_down(-least_share)} to {_rounded_down(most_share)}: change --attention-share or lower {flag}"
            )


def _rounded_down(value: float) -> float:
    """Round down to the four decimals that are printed, so that a printed limit can be met."""
    return math.floor(1e4 * value) / 1e4


def _joined(words: list[str], last: str) -> str:
    return f"{', '.join(words[:-1])} {last} {words[-1]}"
