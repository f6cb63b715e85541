"""Second moments in; the order in which units go out, the weights of the rest re-fitted after each removal."""

from __future__ import annotations

import torch

#: removals between two matrix-matrix updates
_LAZY = 64


def remove_greedily(
    second_moment: torch.Tensor, gram: torch.Tensor, columns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove units one by one, always the one that costs least, and re-fit the remaining columns each time.

    With P = H^-1 and A = W^T G W the cost of removing the columns u is tr(A_uu P_uu^-1). Afterwards, with
    F = P_uu^-1 P_u: and C = A_u: - A_uu F / 2,

        P <- P - P_u:^T F        A <- A - F^T C - C^T F

    (Hassibi & Stork 1993, block form; A follows from the optimal update W <- W - W_u F). Single columns are updated
    lazily: diagonals at once, the matrices once every `_LAZY` removals by matrix-matrix products.

    Args:
        second_moment: H, symmetric positive definite `(n, n)`, float64.
        gram: A = W^T G W, symmetric positive semi-definite `(n, n)`, float64.
        columns: int64 `(n_units, width)`, the columns of each unit.

    Returns:
        order: int64 `(n_units,)`, units in order of removal.
        cost: float64 `(n_units,)`, cumulative cost, non-decreasing.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(second_moment))
    if columns.shape[1] == 1:
        permutation = columns[:, 0]
        order, steps = _remove_columns(inverse[permutation][:, permutation], gram[permutation][:, permutation])
    else:
        order, steps = _remove_blocks(inverse, gram.clone(), columns)
    return order, steps.clamp(min=0).cumsum(0)


def _remove_blocks(p: torch.Tensor, a: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`remove_greedily` for units of several columns: few of them, so each one is a matrix-matrix update."""
    alive = list(range(len(columns)))
    order, steps = [], []
    while alive:
        index = columns[alive]  # (alive, width)
        p_blocks = p[index[:, :, None], index[:, None, :]]
        a_blocks = a[index[:, :, None], index[:, None, :]]
        factors = torch.linalg.cholesky(p_blocks)
        costs = torch.cholesky_solve(a_blocks, factors).diagonal(dim1=1, dim2=2).sum(1)
        best = int(costs.argmin())
        u = index[best]
        f = torch.cholesky_solve(p[u], factors[best])  # (width, n)
        c = a[u] - a_blocks[best] @ f / 2
        p -= p[u].T @ f
        cross = f.T @ c
        a -= cross + cross.T
        order.append(alive.pop(best))
        steps.append(costs[best])
    return torch.tensor(order), torch.stack(steps)


def _remove_columns(p: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`remove_greedily` for units of one column, compacted to the columns that are left at each flush."""
    n = len(p)
    left = torch.arange(n)
    order = torch.empty(n, dtype=torch.long)
    steps = torch.empty(n, dtype=p.dtype)
    done = 0
    while done < n:
        block = min(_LAZY, n - done)
        p_diagonal, a_diagonal = p.diagonal().clone(), a.diagonal().clone()
        rows = torch.zeros(block, len(p), dtype=p.dtype)
        fs, cs = torch.zeros_like(rows), torch.zeros_like(rows)
        picked = torch.empty(block, dtype=torch.long)
        for k in range(block):
            costs = a_diagonal / p_diagonal
            u = int(costs.argmin())
            rows[k] = p[u] - rows[:k, u] @ fs[:k]
            fs[k] = rows[k] / rows[k, u]
            a_row = a[u] - fs[:k, u] @ cs[:k] - cs[:k, u] @ fs[:k]
            cs[k] = a_row - a_row[u] / 2 * fs[k]
            steps[done + k] = costs[u]
            picked[k] = u
            p_diagonal -= rows[k] * fs[k]
            a_diagonal -= 2 * fs[k] * cs[k]
            p_diagonal[u], a_diagonal[u] = 1.0, torch.inf
        order[done : done + block] = left[picked]
        done += block
        keep = torch.ones(len(p), dtype=torch.bool)
        keep[picked] = False
        rows, fs, cs = rows[:, keep], fs[:, keep], cs[:, keep]
        cross = fs.T @ cs
        p = p[keep][:, keep] - rows.T @ fs
        a = a[keep][:, keep] - (cross + cross.T)
        left = left[keep]
    return order, steps
