"""Allocate a budget over query heads as well as KV groups and FFN channels.

A layer may lose the same number of query heads from every KV group (n_rep 4 -> 3), whole groups, or both, whichever
costs least per parameter by the criterion `curvature`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..dependency_graph import UnitSlices, trace_units
from ..errors import UsageError
from ..linalg import fill_, invert_, remove_within, weighted_gram
from ..models import OUTPUT_PROJECTION, Key
from ..plan import LayerPlan
from ..statistics import Statistics
from .budget import Budget
from .convex_hull import allocate_global, half_channel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class QueryHeadOption:
    """An attention block whose KV groups have lost the same number of query heads, and its removal curve from there.

    Attributes:
        heads: int64 `(groups, left)`, the remaining query heads of every group.
        start: cost of the removed heads.
        order: int64 `(groups,)`, groups in order of removal.
        cost: float64 `(groups,)`, `cost[k]` is the cost of removing the first `k + 1` groups, in addition to `start`.
    """

    heads: torch.Tensor
    start: float
    order: torch.Tensor
    cost: torch.Tensor

    def kept(self, removed: int, channels: tuple[int, ...]) -> LayerPlan:
        """Return the plan of a layer that also loses the first `removed` groups and keeps `channels` of the FFN."""
        groups = self.order[removed:].sort().values
        return LayerPlan(tuple(groups.tolist()), tuple(self.heads[groups].flatten().tolist()), channels)


def query_head_options(second_moment: torch.Tensor, gram: torch.Tensor, slices: UnitSlices) -> Iterator[QueryHeadOption]:
    """Yield options from all query heads down to one per group, refitting the other columns after each removal.

    In every round each group loses one head, the cheapest over all groups first; costs and updates are those of
    `remove_greedily`. Each round gets its own curve over groups.

    Args:
        second_moment: H, symmetric positive definite `(n, n)`, float64, over the inputs of `o_proj`.
        gram: W^T G W, `(n, n)`, float64.
        slices: unit slices of the layer.
    """
    columns = slices.query[OUTPUT_PROJECTION["attention"]]  # (n_q, head_dim)
    owner = slices.group_of_query.tolist()
    groups = max(owner) + 1
    p, a = fill_(invert_(second_moment.clone())), gram
    remaining, spent = list(range(len(owner))), 0.0
    while True:
        left = len(remaining) // groups
        heads = torch.tensor(remaining).view(groups, left)
        index = columns[heads].flatten()
        units = torch.arange(len(index)).view(groups, -1)
        # P and A are zero at removed columns
        order, cost = remove_within(p[index][:, index], a[index][:, index], units)
        yield QueryHeadOption(heads, spent, order, cost)
        if left == 1:
            return
        pending = set(range(groups))
        while pending:
            prices = {head: _price(p, a, columns[head]) for head in remaining if owner[head] in pending}
            cheapest = min(prices, key=prices.__getitem__)
            spent += max(0.0, prices[cheapest])
            u = columns[cheapest]
            f = torch.linalg.solve(p[u][:, u], p[u])
            c = a[u] - a[u][:, u] @ f / 2
            cross = f.T @ c
            p, a = p - p[u].T @ f, a - cross - cross.T
            remaining.remove(cheapest)
            pending.remove(owner[cheapest])


def _price(p: torch.Tensor, a: torch.Tensor, u: torch.Tensor) -> float:
    """Return tr(A_uu P_uu^-1), the cost of removing the columns u."""
    return float(torch.linalg.solve(p[u][:, u], a[u][:, u]).trace())


def allocate_query_heads(
    budget: Budget, costs: Mapping[Key, torch.Tensor], options: Mapping[int, list[QueryHeadOption]]
) -> tuple[dict[Key, int], dict[int, QueryHeadOption]]:
    """Choose query heads and groups at one price per parameter for all layers, and meet the budget with FFN channels.

    Args:
        budget: the parameters to remove.
        costs: `{block: float64 (n_units,)}` of the FFN blocks.
        options: `{layer: query_head_options}` of the attention blocks.

    Returns:
        `{block: units removed}`, whose groups have the chosen number of heads, and `{layer: chosen option}`.
    """
    removable = budget.removable
    freed: dict[Key, torch.Tensor] = {}
    cost: dict[Key, torch.Tensor] = {}
    for key, units in budget.units.items():
        choices = [(0, 0.0, costs[key])]
        if key[1] == "attention":
            choices = [(_freed_by_heads(budget, key, option), option.start, option.cost) for option in options[key[0]]]
        count = torch.arange(removable[key] + 1, dtype=torch.float64)
        whole = budget.rest[key] * (count == units)
        sizes = [by_heads + (budget.unit[key] - by_heads // units) * count + whole for by_heads, _, _ in choices]
        nothing = torch.zeros(1, dtype=torch.float64)
        prices = [start + torch.cat((nothing, curve[: removable[key]])) for _, start, curve in choices]
        freed[key], cost[key] = torch.stack(sizes), torch.stack(prices)  # (choices, removable + 1)

    def chosen(price: float) -> dict[Key, int]:
        return {key: int((cost[key] - price * freed[key]).argmin()) for key in cost}

    low, high = 0.0, 1.0 + 2 * sum(float(c.max()) for c in cost.values())
    for _ in range(200):
        price = (low + high) / 2
        total = sum(float(freed[key].flatten()[place]) for key, place in chosen(price).items())
        low, high = (low, price) if total > budget.parameters else (price, high)
    places = {key: divmod(place, cost[key].shape[1]) for key, place in chosen(low).items() if key[1] == "attention"}
    blocks = {key: options[key[0]][choice] for key, (choice, _) in places.items()}
    groups = {key: count for key, (_, count) in places.items()}
    spent = sum(float(freed[key][place]) for key, place in places.items())
    channels = {key: count for key, count in budget.units.items() if key[1] == "mlp"}
    rest = replace(budget, parameters=budget.parameters - spent, units=channels)
    removed = {**groups, **allocate_global(rest, costs)}
    missed = abs(rest.parameters - sum(budget.freed(key, removed[key]) for key in channels))
    if missed > half_channel(budget):
        # channels cannot compensate for the last group: allocate all units again with these options
        by_heads = {key: _freed_by_heads(budget, key, option) for key, option in blocks.items()}
        unit = {key: size - by_heads.get(key, 0) // budget.units[key] for key, size in budget.unit.items()}
        rest = replace(budget, parameters=budget.parameters - sum(by_heads.values()), unit=unit)
        removed = allocate_global(rest, {**costs, **{key: option.cost for key, option in blocks.items()}})
    return removed, {key[0]: option for key, option in blocks.items()}


def _freed_by_heads(budget: Budget, key: Key, option: QueryHeadOption) -> int:
    """Return the parameters of the query heads that `option` removes: rows of `q_proj`, columns of `o_proj`."""
    layer = budget.shape.layers[key[0]]
    return (layer.query_heads - option.heads.numel()) * budget.shape.query_head_parameters(layer)


def options_of(model: PreTrainedModel, statistics: Statistics, layers: set[int]) -> dict[int, list[QueryHeadOption]]:
    """Compute the `query_head_options` of `layers`.

    Raises:
        UsageError: the statistics are of another criterion, or without moments.
    """
    if statistics.criterion != "curvature":
        raise UsageError(
            f"allocation query_heads requires criterion curvature, and the statistics are for {statistics.criterion}: "
            "collect them with criterion='curvature'"
        )
    slices = trace_units(statistics.source.layers)
    options = {}
    for layer in sorted(layers):
        moments = statistics.blocks[layer, "attention"].moments
        if moments is None or moments.gradients is None:
            raise UsageError("allocation query_heads needs statistics with moments: collect them with moments=True")
        linear = model.get_decoder().layers[layer].get_submodule(OUTPUT_PROJECTION["attention"])
        gram = fill_(weighted_gram(linear.weight.detach(), moments.gradients))
        options[layer] = list(query_head_options(moments.ridged(), gram, slices[layer]))
    return options
