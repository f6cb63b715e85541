"""Spend a budget where removal curves cost least per parameter, exact to one FFN channel."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch

from ..models import Key
from .budget import Budget


def allocate_global(budget: Budget, costs: Mapping[Key, torch.Tensor]) -> dict[Key, int]:
    """Spend the budget where the convex hulls of the curves cost least per parameter.

    On its lower convex hull a curve has increasing marginal cost, so that the greedy choice is optimal for the hulls
    (Fox 1966; equal-slope condition of Shoham & Gersho 1988).

    Args:
        budget: the parameters to remove.
        costs: `{block: float64 (n_units,)}`, cumulative cost of removing the first k + 1 units.

    Returns:
        `{block: units removed}`, within half an FFN channel of the budget as long as there are channels to trade. If the
        budget fixes the share of attention blocks, their cheapest groups are removed, to within half a group.
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
        # the counts nearest to the share; channels must be able to make up the rest
        counts = sorted(range(len(freed)), key=lambda n: abs(freed[n] - share))
        return _fit(budget, groups, counts[:3], channels, slack=half_channel(budget))
    groups, beyond = _reached(budget, segments)
    counts = [n for n in (len(groups), len(groups) - 1, len(groups) - 2, len(groups) + 1) if n >= 0]
    return _fit(budget, groups + beyond[:1], counts, channels)


def _reached(
    budget: Budget, segments: Sequence[tuple[float, Key, int, int]]
) -> tuple[list[tuple[Key, int]], list[tuple[Key, int]]]:
    """Split the KV groups of `segments`, as `(block, count)`, into those within the budget and the next ones beyond it."""
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


def half_channel(budget: Budget) -> float:
    """Return the tolerance in parameters to which FFN channels can meet a budget."""
    return max((budget.unit[key] for key in budget.units if key[1] == "mlp"), default=0) / 2 + 1e-6


def _fit(
    budget: Budget,
    groups: list[tuple[Key, int]],
    counts: list[int],
    channels: list[tuple[Key, int, int]],
    slack: float = 0.0,
) -> dict[Key, int]:
    """Remove the first `counts[i]` of `groups`, for the best i, and channels for the rest of the budget.

    At the budget all marginal costs per parameter are about equal, so that trading one or two groups for channels costs
    nothing: the count that meets the budget best is chosen, or the first that misses it by at most `slack`.
    """
    options = []
    for number in counts:
        removed = dict.fromkeys(budget.units, 0)
        for key, count in groups[:number]:
            removed[key] = max(removed[key], count)
        left = budget.parameters - sum(budget.freed(key, count) for key, count in removed.items())
        cut = {key: 0 for key in budget.units if key[1] == "mlp"}
        rest = left
        for key, start, end in channels:
            if cut[key] < start:
                # an earlier segment of this block's curve did not fit
                continue
            whole = budget.freed(key, end) - budget.freed(key, start)
            if rest < whole - budget.unit[key] / 2:
                most = min(end, budget.floor_or_all(key)) - start
                end = start + max(0, min(most, round(rest / budget.unit[key])))
            rest -= budget.freed(key, end) - budget.freed(key, start)
            cut[key] = end
            if abs(rest) <= budget.unit[key] / 2:
                break
        cut = settle(budget, budget.removable, cut, left)
        options.append((abs(left - sum(budget.freed(key, count) for key, count in cut.items())), removed | cut))
    least = min(miss for miss, _ in options)
    return next(removed for miss, removed in options if miss <= max(least + 1, slack))


def _hull(points: Sequence[tuple[float, float]]) -> list[tuple[int, int]]:
    """Return the segments `(start, end)` of the lower convex hull of `points`, sorted by their first coordinate."""
    corners: list[int] = []
    for i, (x, y) in enumerate(points):
        while len(corners) >= 2:
            (xa, ya), (xb, yb) = points[corners[-2]], points[corners[-1]]
            if (yb - ya) * (x - xb) < (y - yb) * (xb - xa):
                break
            corners.pop()
        corners.append(i)
    return list(zip(corners[:-1], corners[1:], strict=True))


def settle(budget: Budget, limit: Mapping[Key, int], channels: dict[Key, int], left: float) -> dict[Key, int]:
    """Adjust `channels` by up to one per block to make up for the norms that whole removed blocks free."""
    miss = left - sum(budget.freed(key, count) for key, count in channels.items())
    for key, count in channels.items():
        for other in (count - 1, count + 1):
            change = budget.freed(key, other) - budget.freed(key, count)
            if 0 <= other <= limit[key] and abs(miss - change) < abs(miss) - 1e-6:
                channels[key], miss = other, miss - change
                break
    return channels
