"""Register the allocations: how a budget is divided among the blocks of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..models import Key
from ..statistics import Statistics
from .budget import Budget
from .convex_hull import allocate_global
from .query_heads import QueryHeadOption, allocate_query_heads, options_of
from .rates import allocate_layer_importance, allocate_per_layer, allocate_uniform
from .search import refine


@dataclass(frozen=True)
class AllocationInputs:
    """Everything an allocation may read besides the budget.

    Attributes:
        statistics: removal curves of every block, and the moments that `search` and `query_heads` need.
        model: the loaded model that was measured, for `search` and `query_heads`; left unchanged.
        rates: for `per_layer`, the fraction to remove per layer.
        layer_scores: for `layer_importance`, the importance per layer.
        temperature: for `layer_importance`, None for 1.
    """

    statistics: Statistics
    model: Any = None
    rates: Sequence[float] = ()
    layer_scores: Sequence[float] = ()
    temperature: float | None = None

    def costs(self, budget: Budget) -> dict[Key, torch.Tensor]:
        """Return the removal curve of every block at whole units of `budget`: float64 `(units,)`."""
        return {key: budget.in_lots(key, self.statistics.blocks[key].curve.cost) for key in budget.units}


@dataclass(frozen=True)
class Allocated:
    """How many units each block loses.

    Attributes:
        removed: `{block: units of the budget}`.
        heads: `{layer: query heads that its KV groups keep}`, for layers whose groups lose query heads.
    """

    removed: Mapping[Key, int]
    heads: Mapping[int, QueryHeadOption] = field(default_factory=dict)


def _global(budget: Budget, inputs: AllocationInputs) -> Allocated:
    return Allocated(allocate_global(budget, inputs.costs(budget)))


def _uniform(budget: Budget, _inputs: AllocationInputs) -> Allocated:
    return Allocated(allocate_uniform(budget))


def _query_heads(budget: Budget, inputs: AllocationInputs) -> Allocated:
    layers = {layer for layer, kind in budget.units if kind == "attention"}
    options = options_of(inputs.model, inputs.statistics, layers)
    return Allocated(*allocate_query_heads(budget, inputs.costs(budget), options))


def _search(budget: Budget, inputs: AllocationInputs) -> Allocated:
    start = allocate_global(budget, inputs.costs(budget))
    return Allocated(refine(inputs.model, inputs.statistics, budget, start))


def _per_layer(budget: Budget, inputs: AllocationInputs) -> Allocated:
    return Allocated(allocate_per_layer(budget, inputs.rates))


def _layer_importance(budget: Budget, inputs: AllocationInputs) -> Allocated:
    temperature = 1.0 if inputs.temperature is None else inputs.temperature
    return Allocated(allocate_layer_importance(budget, inputs.layer_scores, temperature))


Allocation = Callable[[Budget, AllocationInputs], Allocated]
ALLOCATIONS: dict[str, Allocation] = {
    "global": _global,
    "uniform": _uniform,
    "query_heads": _query_heads,
    "search": _search,
    "per_layer": _per_layer,
    "layer_importance": _layer_importance,
}
#: allocations that need statistics and the loaded model they were collected on
MEASURING = ("query_heads", "search")
