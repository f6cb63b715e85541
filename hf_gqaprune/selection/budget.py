"""TODO."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import UsageError, unknown
from ..models import Key, ModelShape, unit_parameters

ALLOCATION_NAMES = ("global", "uniform", "query_heads", "search", "per_layer", "layer_importance")


@dataclass(frozen=True)
class Budget:
    """What allocation is asked for. Its units are KV groups and lots of `lot` FFN channels; kept layers are not in it.

    Attributes:
        shape: sizes of the model.
        parameters: how many parameters to remove.
        unit: `{block: parameters of one unit}`.
        units: `{block: number of units}`.
        floor: `{block: units that must stay}`.
        rest: parameters that go with the last unit of a block: its norm, and its output bias.
        lot: FFN channels that are only traded together.
        spare: `{FFN block: channels beyond a multiple of lot}`; they go in any case and are not part of `parameters`.
        attention: parameters to take from attention blocks; None: wherever they cost least.
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
        """Units that may go, per block."""
        return {key: max(0, count - self.floor[key]) for key, count in self.units.items()}

    def most(self, kinds: Sequence[str] = ("attention", "mlp")) -> int:
        """Parameters that can be removed at the most."""
        return sum(self.freed(key, count) for key, count in self.removable.items() if key[1] in kinds)

    def freed(self, key: Key, count: int) -> int:
        """Parameters that go with `count` units of a block."""
        return count * self.unit[key] + (self.rest[key] if count and count == self.units[key] else 0)

    def floor_or_all(self, key: Key) -> int:
        """Units that may go without the block itself going."""
        return min(self.removable[key], self.units[key] - 1)

    def in_lots(self, key: Key, cost: torch.Tensor) -> torch.Tensor:
        """A block's curve, float64 `(channels or groups,)`, at whole units of this budget: float64 `(units,)`."""
        if key[1] == "attention":
            return cost
        spare = self.spare[key]
        start = cost[spare - 1] if spare else 0.0
        return cost[spare + self.lot - 1 :: self.lot] - start

    def unpacked(self, removed: Mapping[Key, int]) -> dict[Key, int]:
        """KV groups and FFN channels, of units of this budget."""
        channels = {key: self.spare[key] + self.lot * n for key, n in removed.items() if key[1] == "mlp"}
        return {**removed, **channels}


def rounded_down(value: float) -> float:
    """Rounded down to the four decimals that are printed, so that what is called possible is."""
    return math.floor(1e4 * value) / 1e4


def rounded_up(value: float) -> float:
    return math.ceil(1e4 * value) / 1e4


def listed(words: list[str], last: str) -> str:
    return f"{', '.join(words[:-1])} {last} {words[-1]}"


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
            if not is_number(value) or not 0 < value < 1:
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
        if t is not None and not (is_number(t) and 0.01 <= t < math.inf):
            raise UsageError(f"temperature={t!r} must be a number from 0.01, such as 1")
        if share is not None and not (is_number(share) and 0 <= share <= 1):
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
                f"{name}={value} removes more than the layers hold with {listed(limits, 'and')} "
                f"(at most {rounded_down(most / total)}): lower {listed(flags, 'or')}"
                + (", or keep fewer layers" if kept else "")
            )
        if target < forced:
            raise UsageError(
                f"{name}={value} removes less than round_to={self.round_to} takes from the FFN widths of this model "
                f"(at least {rounded_up(forced / total)}): raise {flag} or lower --round-to"
            )
        if budget.attention is not None:
            least_share = max(0.0, 1 - (budget.most(["mlp"]) + forced) / target)
            most_share = min(1 - forced / target, budget.most(["attention"]) / target)
            if not least_share <= budget.attention / target <= most_share:
                raise UsageError(
                    f"attention_share={self.attention_share} with {name}={value}: the blocks hold enough for a share from "
                    f"{rounded_up(least_share)} to {rounded_down(most_share)}: change --attention-share or lower {flag}"
                )


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
