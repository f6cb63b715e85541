"""Turn removal rates per layer into units per block, exact to one FFN channel."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..errors import UsageError
from ..models import Key
from .budget import Budget
from .convex_hull import half_channel, settle


def allocate_uniform(budget: Budget) -> dict[Key, int]:
    """Remove the same fraction of every layer: the nearest number of KV groups, and FFN channels for the exact rest.

    Layers of equal size keep equal sizes, up to one channel.
    """
    rate = budget.parameters / sum(budget.unit[key] * count for key, count in budget.units.items())
    return _at_rates(budget, {key: rate for key in budget.units}, budget.parameters)


def allocate_per_layer(budget: Budget, rates: Sequence[float]) -> dict[Key, int]:
    """Remove the fraction `rates[i]` of the attention and FFN weights of layer i.

    Raises:
        UsageError: the list has another length, or a rate is outside [0, 1).
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
    """Remove less from important layers: rates softmax(-z / temperature), scaled to the budget, capped by the floors.

    z are the scores, standardised over the layers of the budget, so that the temperature does not depend on the unit of
    the scores: at 1 a layer one standard deviation less important loses e times as much; towards infinity all rates
    are equal.

    Args:
        budget: the parameters to remove.
        scores: importance per layer of the model, in any unit (see `measure_layers`).
        temperature: at least 0.01.

    Raises:
        UsageError: the list has another length, or a score is not finite.
    """
    layers = len(budget.shape.layers)
    if len(scores) != layers:
        raise UsageError(f"{len(scores)} layer scores for a model of {layers} layers: give one score per layer")
    for index, score in enumerate(scores):
        if not math.isfinite(score):
            raise UsageError(f"layer {index}: score {score} must be a finite number")
    present = sorted({layer for layer, _ in budget.units})
    mean = statistics.fmean(scores[i] for i in present)
    deviation = statistics.pstdev(scores[i] for i in present) or 1.0
    log_weight = {i: -(scores[i] - mean) / deviation / temperature for i in present}
    size = {i: sum(budget.unit[key] * n for key, n in budget.units.items() if key[0] == i) for i in present}
    most = {i: sum(budget.freed(key, n) for key, n in budget.removable.items() if key[0] == i) for i in present}

    def rates(log_scale: float) -> dict[int, float]:
        # at least e^-40, which removes nothing, so that every layer can compensate for the rounding of the others
        return {i: min(most[i] / size[i], math.exp(max(-40, min(1, log_scale + log_weight[i])))) for i in present}

    low, high = -max(log_weight.values()) - 40, 1 - min(log_weight.values())
    for _ in range(100):
        middle = (low + high) / 2
        enough = sum(rate * size[i] for i, rate in rates(middle).items()) >= budget.parameters
        low, high = (low, middle) if enough else (middle, high)
    chosen = rates(high)
    return _at_rates(budget, {key: chosen[key[0]] for key in budget.units}, budget.parameters)


def _at_rates(budget: Budget, rates: Mapping[Key, float], target: float) -> dict[Key, int]:
    """Round each attention block's rate to the nearest number of groups, then remove channels evenly to meet `target`.

    If channels cannot compensate for the rounding (attention much larger than the FFN), the group counts of all blocks
    are shifted together; whole blocks are removed only if nothing else meets the target.
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
            removed |= settle(budget, limit, _spread_channels(budget, rates, limit, left), left)
            miss = abs(target - sum(budget.freed(key, count) for key, count in removed.items()))
            if miss < least - 1e-6:
                best, least = removed, miss
            if least <= half_channel(budget):
                return best
    return best


def _spread_channels(
    budget: Budget, rates: Mapping[Key, float], limit: Mapping[Key, int], left: float
) -> dict[Key, int]:
    """Distribute `left` parameters over FFN channels in proportion to rate times width: `{FFN block: channels}`."""
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
