"""Curvature statistics and a budget in; how many query heads every layer's groups lose, and how many units go besides, out.

A layer may give the same number of query heads from every KV group (n_rep 4 -> 3), whole groups, or both. What costs
least per parameter is taken, at the curvature's price.
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
    """An attention block whose groups have all lost the same number of query heads, and the curve of what is left.

    Attributes:
        heads: int64 `(groups, left)`, the query heads of every group.
        start: cost of the heads that went.
        order: int64 `(groups,)`, groups in the order in which they go then.
        cost: float64 `(groups,)`, `cost[k]` is the cost of the first `k + 1` of them, on top of `start`.
    """

    heads: torch.Tensor
    start: float
    order: torch.Tensor
    cost: torch.Tensor

    def kept(self, removed: int, channels: tuple[int, ...]) -> LayerPlan:
        """The plan of a layer that also loses the first `removed` groups, and keeps these FFN channels."""
        groups = self.order[removed:].sort().values
        return LayerPlan(tuple(groups.tolist()), tuple(self.heads[groups].flatten().tolist()), channels)


def thinned(second_moment: torch.Tensor, gram: torch.Tensor, slices: UnitSlices) -> Iterator[QueryHeadOption]:
    """From all query heads down to one per group, everything else re-fitted after each removal.

    In every round each group loses one head, the cheapest first over all groups; costs and updates are those of
    `remove_greedily`. The curve over groups begins anew on each round's result.

    Args:
        second_moment: H, symmetric positive definite `(n, n)`, float64, over the inputs of `o_proj`.
        gram: W^T G W, `(n, n)`, float64.
        slices: index sets of the layer.
    """
    columns = slices.query[OUTPUT_PROJECTION["attention"]]  # (n_q, head_dim)
    owner = slices.group_of_query.tolist()
    groups = max(owner) + 1
    p, a = fill_(invert_(second_moment.clone())), gram
    alive, spent = list(range(len(owner))), 0.0
    while True:
        left = len(alive) // groups
        heads = torch.tensor(alive).view(groups, left)
        index = columns[heads].flatten()
        units = torch.arange(len(index)).view(groups, -1)
        # where columns went, P and A hold zeros
        order, cost = remove_within(p[index][:, index], a[index][:, index], units)
        yield QueryHeadOption(heads, spent, order, cost)
        if left == 1:
            return
        waiting = set(range(groups))
        while waiting:
            prices = {head: _price(p, a, columns[head]) for head in alive if owner[head] in waiting}
            cheapest = min(prices, key=prices.__getitem__)
            spent += max(0.0, prices[cheapest])
            u = columns[cheapest]
            f = torch.linalg.solve(p[u][:, u], p[u])
            c = a[u] - a[u][:, u] @ f / 2
            cross = f.T @ c
            p, a = p - p[u].T @ f, a - cross - cross.T
            alive.remove(cheapest)
            waiting.remove(owner[cheapest])


def _price(p: torch.Tensor, a: torch.Tensor, u: torch.Tensor) -> float:
    """tr(A_uu P_uu^-1)."""
    return float(torch.linalg.solve(p[u][:, u], a[u][:, u]).trace())


def allocate_query_heads(
    budget: Budget, costs: Mapping[Key, torch.Tensor], options: Mapping[int, list[QueryHeadOption]]
) -> tuple[dict[Key, int], dict[int, QueryHeadOption]]:
    """Choose query heads and groups of every layer at one price per parameter, and meet the budget with FFN channels.

    Args:
        budget: what to remove.
        costs: `{block: float64 (n_units,)}` of the FFN blocks.
        options: `{layer: what thinned gives}` of the attention blocks.

    Returns:
        `{block: units removed}`, groups of the chosen sizes, and `{layer: the chosen option}`.
    """
    removable = budget.removable
    freed: dict[Key, torch.Tensor] = {}
    cost: dict[Key, torch.Tensor] = {}
    for key, units in budget.units.items():
        ways = [(0, 0.0, costs[key])]
        if key[1] == "attention":
            ways = [(_freed_by_heads(budget, key, option), option.start, option.cost) for option in options[key[0]]]
        count = torch.arange(removable[key] + 1, dtype=torch.float64)
        whole = budget.rest[key] * (count == units)
        sizes = [by_heads + (budget.unit[key] - by_heads // units) * count + whole for by_heads, _, _ in ways]
        nothing = torch.zeros(1, dtype=torch.float64)
        prices = [start + torch.cat((nothing, curve[: removable[key]])) for _, start, curve in ways]
        freed[key], cost[key] = torch.stack(sizes), torch.stack(prices)  # (ways, removable + 1)

    def chosen(price: float) -> dict[Key, int]:
        return {key: int((cost[key] - price * freed[key]).argmin()) for key in cost}

    low, high = 0.0, 1.0 + 2 * sum(float(c.max()) for c in cost.values())
    for _ in range(200):
        price = (low + high) / 2
        total = sum(float(freed[key].flatten()[place]) for key, place in chosen(price).items())
        low, high = (low, price) if total > budget.parameters else (price, high)
    places = {key: divmod(place, cost[key].shape[1]) for key, place in chosen(low).items() if key[1] == "attention"}
    blocks = {key: options[key[0]][way] for key, (way, _) in places.items()}
    groups = {key: count for key, (_, count) in places.items()}
    spent = sum(float(freed[key][place]) for key, place in places.items())
    channels = {key: count for key, count in budget.units.items() if key[1] == "mlp"}
    rest = replace(budget, parameters=budget.parameters - spent, units=channels)
    removed = {**groups, **allocate_global(rest, costs)}
    missed = abs(rest.parameters - sum(budget.freed(key, removed[key]) for key in channels))
    if missed > half_channel(budget):
        # channels do not make up for the jump to the next group
        by_heads = {key: _freed_by_heads(budget, key, option) for key, option in blocks.items()}
        unit = {key: size - by_heads.get(key, 0) // budget.units[key] for key, size in budget.unit.items()}
        rest = replace(budget, parameters=budget.parameters - sum(by_heads.values()), unit=unit)
        removed = allocate_global(rest, {**costs, **{key: option.cost for key, option in blocks.items()}})
    return removed, {key[0]: option for key, option in blocks.items()}


def _freed_by_heads(budget: Budget, key: Key, option: QueryHeadOption) -> int:
    """Parameters of the query heads that a layer's groups have lost: rows of `q_proj`, columns of `o_proj`."""
    shape = budget.shape.layers[key[0]]
    gone = shape.query_heads - option.heads.numel()
    # a group is `n_rep + 1` pairs of heads, and the bias of every row
    bias = budget.unit[key] - 2 * (shape.n_rep + 1) * budget.shape.hidden_size * shape.head_dim
    return gone * (2 * budget.shape.hidden_size * shape.head_dim + bias // (shape.n_rep + 2))


def options_of(model: PreTrainedModel, statistics: Statistics, layers: set[int]) -> dict[int, list[QueryHeadOption]]:
    """What `thinned` gives for `layers`.

    Raises:
        UsageError: statistics of another criterion, or without moments.
    """
    if statistics.criterion != "curvature":
        raise UsageError(
            f"allocation query_heads prices by criterion curvature, and these statistics are for {statistics.criterion}: "
            "collect them with curvature"
        )
    slices = trace_units(statistics.source.layers)
    found = {}
    for layer in sorted(layers):
        moments = statistics.blocks[layer, "attention"].moments
        if moments is None or moments.gradients is None:
            raise UsageError("allocation query_heads needs statistics with moments: collect them with moments=True")
        linear = model.get_decoder().layers[layer].get_submodule(OUTPUT_PROJECTION["attention"])
        gram = fill_(weighted_gram(linear.weight.detach(), moments.gradients))
        found[layer] = list(thinned(moments.ridged(), gram, slices[layer]))
    return found
