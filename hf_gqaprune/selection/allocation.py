"""Removal curves and a budget in; how many units each block keeps out. Pure arithmetic, exact to one FFN channel."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from ..errors import UsageError
from ..models import Key
from .budget import Budget


def allocate_global(budget: Budget, costs: Mapping[Key, torch.Tensor]) -> dict[Key, int]:
    """Spend the budget where the convex hulls of the curves cost least per parameter.

    The lower convex hull makes each curve's marginal cost increasing, so that the greedy choice is optimal for the
    hulls (Fox 1966; equal-slope condition of Shoham & Gersho 1988).

    Args:
        budget: what to remove.
        costs: `{block: float64 (n_units,)}`, cumulative cost of removing the first k + 1 units.

    Returns:
        `{block: units removed}`, within half a channel of the budget wherever FFN channels are left to trade; where the
        budget says what attention blocks give, the cheapest of their groups, to half a group.
    """
    removable = budget.removable
    segments: list[tuple[float, Key, int, int]] = []
    for key in budget.units:
        points = [(0.0, 0.0)]
        points += [(float(budget.freed(key, k + 1)), float(y)) for k, y in enumerate(costs[key][: removable[key]])]
        for start, end in _hull(points):
            slope = (points[end][1] - points[start][1]) / (points[end][0] - points[start][0])
            segments.append((slope, key, start, end))
    segments.sort()
    channels = [(key, start, end) for _, key, start, end in segments if key[1] == "mlp"]
    share = budget.attention
    if share is not None:
        groups = [(key, n) for _, key, start, end in segments if key[1] == "attention" for n in range(start + 1, end + 1)]
        sizes = [budget.freed(key, count) - budget.freed(key, count - 1) for key, count in groups]
        freed = [0, *itertools.accumulate(sizes)]
        # the count next to the share that channels can complete
        counts = sorted(range(len(freed)), key=lambda n: abs(freed[n] - share))
        return _fit(budget, groups, counts[:3], channels, slack=_half_channel(budget))
    groups, beyond = _reached(budget, segments)
    counts = [n for n in (len(groups), len(groups) - 1, len(groups) - 2, len(groups) + 1) if n >= 0]
    return _fit(budget, groups + beyond[:1], counts, channels)


def _reached(
    budget: Budget, segments: Sequence[tuple[float, Key, int, int]]
) -> tuple[list[tuple[Key, int]], list[tuple[Key, int]]]:
    """`(block, count)` of the KV groups within the budget when `segments` are bought in order, and of those beyond."""
    groups: list[tuple[Key, int]] = []
    beyond: list[tuple[Key, int]] = []
    spent = 0
    for _, key, start, end in segments:
        if key[1] == "mlp":
            spent += budget.freed(key, end) - budget.freed(key, start)
        for count in range(start + 1, end + 1) if key[1] == "attention" else ():
            size = budget.freed(key, count) - budget.freed(key, count - 1)
            if spent + size > budget.parameters:
                beyond.append((key, count))
                break
            groups.append((key, count))
            spent += size
    return groups, beyond


def _half_channel(budget: Budget) -> float:
    """What a budget is met to where FFN channels are left to trade."""
    return max((budget.unit[key] for key in budget.units if key[1] == "mlp"), default=0) / 2 + 1e-6


def _fit(
    budget: Budget,
    groups: list[tuple[Key, int]],
    counts: list[int],
    channels: list[tuple[Key, int, int]],
    slack: float = 0.0,
) -> dict[Key, int]:
    """Take the first of `groups`, as many as one of `counts` says, and channels for the rest.

    At the budget all marginal costs per parameter are about equal, so one or two groups are traded for channels at no
    cost: the count that meets the budget best is taken, or the first that misses it by no more than `slack`.
    """
    options = []
    for take in counts:
        removed = dict.fromkeys(budget.units, 0)
        for key, count in groups[:take]:
            removed[key] = max(removed[key], count)
        left = budget.parameters - sum(budget.freed(key, count) for key, count in removed.items())
        taken = {key: 0 for key in budget.units if key[1] == "mlp"}
        rest = left
        for key, start, end in channels:
            if taken[key] < start:
                # an earlier part of this block's curve did not fit
                continue
            whole = budget.freed(key, end) - budget.freed(key, start)
            if rest < whole - budget.unit[key] / 2:
                most = min(end, budget.floor_or_all(key)) - start
                end = start + max(0, min(most, round(rest / budget.unit[key])))
            rest -= budget.freed(key, end) - budget.freed(key, start)
            taken[key] = end
            if abs(rest) <= budget.unit[key] / 2:
                break
        taken = _settle(budget, budget.removable, taken, left)
        options.append((abs(left - sum(budget.freed(key, count) for key, count in taken.items())), removed | taken))
    least = min(miss for miss, _ in options)
    return next(removed for miss, removed in options if miss <= max(least + 1, slack))


def _hull(points: Sequence[tuple[float, float]]) -> list[tuple[int, int]]:
    """Segments `(start, end)` of the lower convex hull of `points`, whose first coordinate increases."""
    corners: list[int] = []
    for i, (x, y) in enumerate(points):
        while len(corners) >= 2:
            (xa, ya), (xb, yb) = points[corners[-2]], points[corners[-1]]
            if (yb - ya) * (x - xb) < (y - yb) * (xb - xa):
                break
            corners.pop()
        corners.append(i)
    return list(zip(corners[:-1], corners[1:], strict=True))


def allocate_uniform(budget: Budget, costs: Mapping[Key, torch.Tensor]) -> dict[Key, int]:
    """The same rate in every layer: whole KV groups at the nearest count, FFN channels for the exact rest.

    Layers of equal size keep equal sizes, give or take one channel. `costs` is not read.
    """
    rate = budget.parameters / sum(budget.unit[key] * count for key, count in budget.units.items())
    return _at_rates(budget, {key: rate for key in budget.units}, budget.parameters)


def allocate_per_layer(budget: Budget, rates: Sequence[float]) -> dict[Key, int]:
    """The user's own rates: in layer i the fraction `rates[i]` of its attention and FFN weights goes.

    Raises:
        UsageError: for a list of another length or a rate outside 0 ... 1.
    """
    layers = len(budget.shape.layers)
    if len(rates) != layers:
        raise UsageError(f"{len(rates)} rates for a model of {layers} layers: give one rate per layer")
    for index, rate in enumerate(rates):
        if not 0 <= rate < 1:
            raise UsageError(f"layer {index}: rate {rate} must be at least 0 and below 1")
    removed = dict.fromkeys(budget.units, 0)
    for index, rate in enumerate(rates):
        keys = [key for key in budget.units if key[0] == index]
        size = sum(budget.unit[key] * budget.units[key] for key in keys)
        layer = replace(budget, parameters=rate * size, units={key: budget.units[key] for key in keys})
        removed |= _at_rates(layer, dict.fromkeys(keys, rate), layer.parameters)
    return removed


def allocate_layer_importance(budget: Budget, scores: Sequence[float], temperature: float) -> dict[Key, int]:
    """Rates that fall with a layer's importance: softmax(-z / temperature), scaled to the budget, capped by the floors.

    z are the scores, standardised over the layers of the budget, so that the temperature means the same for every
    measure: at 1 a layer one standard deviation less important loses e times as much; a high one is `uniform`.

    Args:
        budget: what to remove.
        scores: importance per layer of the model, any unit (see `layer_importance.measure`).
        temperature: from 0.01.

    Raises:
        UsageError: for a list of another length or a score that is not finite.
    """
    layers = len(budget.shape.layers)
    if len(scores) != layers:
        raise UsageError(f"{len(scores)} layer scores for a model of {layers} layers: give one score per layer")
    for index, score in enumerate(scores):
        if not math.isfinite(score):
            raise UsageError(f"layer {index}: score {score} must be a finite number")
    present = sorted({layer for layer, _ in budget.units})
    mean = statistics.fmean(scores[i] for i in present)
    spread = statistics.pstdev(scores[i] for i in present) or 1.0
    log_weight = {i: -(scores[i] - mean) / spread / temperature for i in present}
    size = {i: sum(budget.unit[key] * n for key, n in budget.units.items() if key[0] == i) for i in present}
    most = {i: sum(budget.freed(key, n) for key, n in budget.removable.items() if key[0] == i) for i in present}

    def rates(log_scale: float) -> dict[int, float]:
        # from e^-40, which removes nothing, so that every layer can make up for the rounding of the others
        return {i: min(most[i] / size[i], math.exp(max(-40, min(1, log_scale + log_weight[i])))) for i in present}

    low, high = -max(log_weight.values()) - 40, 1 - min(log_weight.values())
    for _ in range(100):
        middle = (low + high) / 2
        enough = sum(rate * size[i] for i, rate in rates(middle).items()) >= budget.parameters
        low, high = (low, middle) if enough else (middle, high)
    chosen = rates(high)
    return _at_rates(budget, {key: chosen[key[0]] for key in budget.units}, budget.parameters)


def _at_rates(budget: Budget, rates: Mapping[Key, float], target: float) -> dict[Key, int]:
    """Groups at the nearest count for each attention block's rate, then channels, spread evenly, to meet `target`.

    Where channels cannot make up for the rounding (attention much larger than the FFN), every attention block takes
    the next count, and blocks go whole only where nothing else meets the target.
    """
    whole, partial = budget.removable, {key: budget.floor_or_all(key) for key in budget.units}
    shifts = sorted(range(-max(whole.values(), default=0), max(whole.values(), default=0) + 1), key=abs)
    best: dict[Key, int] = dict.fromkeys(budget.units, 0)
    least = math.inf
    for limit in (partial, whole):
        most = max((count for key, count in limit.items() if key[1] == "attention"), default=0)
        for shift in (shift for shift in shifts if abs(shift) <= most):
            removed = dict.fromkeys(budget.units, 0)
            for key, count in budget.units.items():
                if key[1] == "attention":
                    removed[key] = max(0, min(limit[key], math.floor(count * rates[key] + 0.5) + shift))
            left = target - sum(budget.freed(key, count) for key, count in removed.items())
            removed |= _settle(budget, limit, _spread_channels(budget, rates, limit, left), left)
            miss = abs(target - sum(budget.freed(key, count) for key, count in removed.items()))
            if miss < least - 1e-6:
                best, least = removed, miss
            if least <= _half_channel(budget):
                return best
    return best


def _spread_channels(
    budget: Budget, rates: Mapping[Key, float], limit: Mapping[Key, int], left: float
) -> dict[Key, int]:
    """`{FFN block: channels removed}` that free `left` parameters, in proportion to rate times width."""
    channels = [key for key in budget.units if key[1] == "mlp"]
    removed = dict.fromkeys(channels, 0)
    while channels and left > 0:
        total = sum(rates[key] * budget.units[key] for key in channels) or 1.0
        unit = budget.unit[channels[0]]
        exact = {key: left / unit * rates[key] * budget.units[key] / total for key in channels}
        capped = [key for key in channels if exact[key] > limit[key]]
        if capped:
            for key in capped:
                removed[key] = limit[key]
                left -= budget.freed(key, limit[key])
                channels.remove(key)
            continue
        whole = round(left / unit)
        for key in channels:
            removed[key] = math.floor(exact[key])
        short = whole - sum(removed[key] for key in channels)
        for key in sorted(channels, key=lambda key: removed[key] - exact[key])[:short]:
            removed[key] += 1
        break
    return removed


def _settle(budget: Budget, limit: Mapping[Key, int], channels: dict[Key, int], left: float) -> dict[Key, int]:
    """Correct `channels` by one a block where blocks that went whole, norm included, freed more than their channels."""
    miss = left - sum(budget.freed(key, count) for key, count in channels.items())
    for key, count in channels.items():
        for other in (count - 1, count + 1):
            change = budget.freed(key, other) - budget.freed(key, count)
            if 0 <= other <= limit[key] and abs(miss - change) < abs(miss) - 1e-6:
                channels[key], miss = other, miss - change
                break
    return channels


Allocation = Callable[[Budget, Mapping[Key, torch.Tensor]], dict[Key, int]]
#: those that need a budget and curves only
ALLOCATIONS: dict[str, Allocation] = {"global": allocate_global, "uniform": allocate_uniform}
