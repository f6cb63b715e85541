"""Remove units greedily by Optimal Brain Surgeon, refitting the remaining weights after each removal."""

from __future__ import annotations

from typing import Any

import torch

from . import obs_cuda
from .symmetric import fill_, invert_

#: removals between two matrix-matrix updates
_LAZY = 64
#: rows per strip of a symmetric matrix; a strip ends at its last diagonal element
_STRIP = 256


def remove_greedily(
    second_moment: torch.Tensor, gram: torch.Tensor, columns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove units one by one, always the cheapest, and refit the remaining columns each time.

    With P = H^-1 and A = W^T G W the cost of removing the columns u is tr(A_uu P_uu^-1). Afterwards, with
    F = P_uu^-1 P_u: and C = A_u: - A_uu F / 2,

        P <- P - P_u:^T F        A <- A - F^T C - C^T F

    (Hassibi & Stork 1993, block form; A follows from the optimal update W <- W - W_u F). Single columns are updated
    lazily: diagonals at once, the matrices every `_LAZY` removals by matrix-matrix products that compute one triangle
    of their symmetric results: 2 n^3 flops in all, half of them for the inverse.

    Both matrices are left unchanged; `remove_within` works in their memory.

    Args:
        second_moment: H, symmetric positive definite `(n, n)`, float64.
        gram: A = W^T G W, symmetric positive semi-definite `(n, n)`, float64.
        columns: int64 `(n_units, width)`, the columns of each unit.

    Returns:
        order: int64 `(n_units,)`, units in order of removal, on the CPU.
        cost: float64 `(n_units,)`, cumulative cost, non-decreasing, on the CPU.

    Raises:
        torch.linalg.LinAlgError: H is not positive definite.
    """
    return remove_within(invert_(second_moment.clone()), gram.clone(), columns)


def remove_within(
    inverse: torch.Tensor, gram: torch.Tensor, columns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run `remove_greedily` on P = H^-1 and A, float64 `(n, n)` from `invert_` and `weighted_gram`; overwrites both."""
    if columns.shape[1] > 1:
        order, steps = _remove_blocks(fill_(inverse), fill_(gram), columns)
    else:
        permutation = columns[:, 0]
        if not torch.equal(permutation, torch.arange(len(gram))):
            inverse, gram = (fill_(matrix)[permutation][:, permutation] for matrix in (inverse, gram))
        if inverse.device.type == "cpu":
            order, steps = _remove_columns(inverse, gram)
        else:
            order, steps = obs_cuda.remove_columns(fill_(inverse), fill_(gram))
    return torch.tensor(order), torch.tensor(steps, dtype=gram.dtype).clamp(min=0).cumsum(0)


def _remove_blocks(p: torch.Tensor, a: torch.Tensor, columns: torch.Tensor) -> tuple[list[int], list[float]]:
    """Remove units of several columns, updating the matrices after each removal."""
    alive = list(range(len(columns)))
    width = columns.shape[1]
    order, steps = [], []
    index = columns.flatten()
    p, a = p[index][:, index], a[index][:, index]
    while alive:
        blocks = [m.view(len(alive), width, len(alive), width).diagonal(dim1=0, dim2=2) for m in (p, a)]
        p_blocks, a_blocks = (block.permute(2, 0, 1) for block in blocks)  # (alive, width, width)
        factors = torch.linalg.cholesky(p_blocks)
        costs = torch.cholesky_solve(a_blocks, factors).diagonal(dim1=1, dim2=2).sum(1)
        best = int(costs.argmin())
        steps.append(float(costs[best]))
        order.append(alive.pop(best))
        keep = torch.ones(len(p), dtype=torch.bool)
        keep[best * width : (best + 1) * width] = False
        p_rows, a_rows = p[~keep][:, keep], a[~keep][:, keep]  # (width, n)
        f = torch.cholesky_solve(p_rows, factors[best])
        c = a_rows - a_blocks[best] @ f / 2
        p, a = p[keep][:, keep], a[keep][:, keep]
        p.addmm_(p_rows.T, f, alpha=-1)
        cross = f.T @ c
        a -= cross
        a -= cross.T
    return order, steps


def _remove_columns(p: torch.Tensor, a: torch.Tensor) -> tuple[list[int], list[float]]:
    """Remove units of one column, working in the memory of P and A.

    The last columns replace the removed ones, so that the remaining matrix is the leading part. Only the columns up to
    the diagonal block of each strip of rows are kept up to date.
    """
    n = len(p)
    left = torch.arange(n)
    order: list[int] = []
    steps: list[float] = []
    while n:
        block = min(_LAZY, n)
        s, r = panels = p.new_empty(2, block, n)
        picked, costs = _pick(p[:n, :n], a[:n, :n], s, r)
        steps += costs
        order += left[picked].tolist()
        n -= block
        holes = [u for u in picked if u < n]
        tail = sorted(set(range(n, n + block)) - set(picked))
        for matrix in (p, a):
            _move(matrix, holes, tail, n)
        panels[:, :, holes] = panels[:, :, tail]
        left[holes] = left[tail]
        s, r = panels[:, :, :n]
        _subtract(p, s, s, n)
        _subtract(a, torch.cat((s, r)), torch.cat((r, s)), n)
    return order, steps


def _pick(p: torch.Tensor, a: torch.Tensor, s: torch.Tensor, r: torch.Tensor) -> tuple[list[int], list[float]]:
    """Choose the next columns to remove, and write the rows that update P and A to `s` and `r`.

    With S = P_uu^-1/2 P_u: and R = P_uu^-1/2 C the updates are P <- P - S^T S and A <- A - S^T R - R^T S.

    Args:
        p, a: `(n, n)`, left unchanged.
        s, r: `(removals, n)`, filled row by row.

    Returns:
        The columns, and the cost of removing each.
    """
    p_rows, a_rows, s_rows, r_rows = map(_array, (p, a, s, r))
    p_diagonal, a_half = _array(p.diagonal().clone()), _array(a.diagonal() / 2)
    picked: list[int] = []
    costs: list[float] = []
    for k, (s_row, r_row) in enumerate(zip(s_rows, r_rows, strict=True)):
        ratios = a_half / p_diagonal
        u = int(ratios.argmin())
        half_cost, scale = float(ratios[u]), float(p_diagonal[u]) ** -0.5
        end = (u // _STRIP + 1) * _STRIP
        for row, matrix in ((s_row, p_rows), (r_row, a_rows)):
            row[:end] = matrix[u, :end]
            row[end:] = matrix[end:, u]
        s_u, r_u = s_rows[:k, u], r_rows[:k, u]
        s_row -= s_u @ s_rows[:k]
        r_row -= r_u @ s_rows[:k] + s_u @ r_rows[:k]
        s_row *= scale
        r_row *= scale
        r_row -= half_cost * s_row
        p_diagonal -= s_row * s_row
        a_half -= s_row * r_row
        p_diagonal[u], a_half[u] = 1.0, float("inf")
        picked.append(u)
        costs.append(2 * half_cost)
    return picked, costs


def _array(tensor: torch.Tensor) -> Any:
    """View the memory as numpy, whose overhead per operation on short vectors is a fraction of torch's."""
    return tensor.numpy()


def _move(matrix: torch.Tensor, holes: list[int], tail: list[int], n: int) -> None:
    """Copy the rows and columns `tail`, all from `n` on, to the positions `holes`, all before `n`."""
    rows = matrix[tail, :n]
    corner = matrix[tail][:, tail].tril()
    rows[:, holes] = corner + corner.tril(-1).T
    cells = _array(matrix)
    for hole, row in zip(holes, _array(rows), strict=True):
        start = hole // _STRIP * _STRIP
        end = min(start + _STRIP, n)
        cells[hole, :end] = row[:end]
        cells[start:n, hole] = row[start:]


def _subtract(matrix: torch.Tensor, left: torch.Tensor, right: torch.Tensor, n: int) -> None:
    """Subtract the symmetric product left^T right from the strips of the leading `(n, n)`."""
    for start in range(0, n, _STRIP):
        end = min(start + _STRIP, n)
        matrix[start:end, :end].addmm_(left[:, start:end].T, right[:, :end], alpha=-1)
