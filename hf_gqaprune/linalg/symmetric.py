"""Factor, invert and solve symmetric positive definite matrices in place, block by block.

Only the lower triangle of a matrix is read and replaced. Temporary memory is a strip of the matrix, never a copy;
matrices no larger than a block are passed to LAPACK whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.linalg import solve_triangular

_HALVES = (torch.bfloat16, torch.float16)
#: rows and columns factored, inverted or solved at once; a GPU needs more of them to be busy
_BLOCK, _GPU_BLOCK = 512, 2048
#: rows of a second moment multiplied at once
_STRIP, _GPU_STRIP = 512, 1024
#: most rows that any of these takes at once, for estimates of memory
MOST_ROWS = max(_BLOCK, _GPU_BLOCK, _STRIP, _GPU_STRIP)


def cholesky_(matrix: torch.Tensor) -> torch.Tensor:
    """Replace the lower triangle of `matrix` by L with L L^T = `matrix`; the rest is left unchanged.

    Args:
        matrix: symmetric positive definite `(n, n)`; only the lower triangle is read.

    Returns:
        `matrix`.

    Raises:
        torch.linalg.LinAlgError: `matrix` is not positive definite.
    """
    for start, end in _blocks(matrix):
        square = matrix[start:end, start:end]
        factor = torch.linalg.cholesky(square)
        square.copy_(factor + square.triu(1))
        for first, last in _blocks(matrix, end):
            rows = matrix[first:last, start:end]
            rows.copy_(solve_triangular(factor.T, rows, upper=True, left=False))
        for first, last in _blocks(matrix, end):
            rows = matrix[first:last, start:end]
            matrix[first:last, end:first].addmm_(rows, matrix[end:first, start:end].T, alpha=-1)
            matrix[first:last, first:last].sub_((rows @ rows.T).tril())
    return matrix


def invert_(matrix: torch.Tensor) -> torch.Tensor:
    """Invert `matrix`, up to the part of the upper triangle that `fill_` completes.

    Args:
        matrix: symmetric positive definite `(n, n)`; overwritten.

    Returns:
        `(n, n)`, in the memory of `matrix` if that is larger than a block.

    Raises:
        torch.linalg.LinAlgError: `matrix` is not positive definite.
    """
    if len(matrix) <= _block(matrix):
        return torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    cholesky_(matrix)
    # L^-1, from the last columns to the first, each from its last rows to the first
    for start, end in reversed(list(_blocks(matrix))):
        square = matrix[start:end, start:end]
        inverse = solve_triangular(square, torch.eye(end - start, dtype=matrix.dtype, device=matrix.device), upper=False)
        for first, last in reversed(list(_blocks(matrix, end))):
            rows = matrix[first:last, first:last].tril() @ matrix[first:last, start:end]
            rows.addmm_(matrix[first:last, end:first], matrix[end:first, start:end])
            matrix[first:last, start:end] = -rows @ inverse
        square.copy_(inverse)
    # L^-T L^-1, from the first rows to the last: each needs the rows from its own on
    for start, end in _blocks(matrix):
        own = matrix[start:end, :end]
        own[:, start:].tril_()
        rows = own[:, start:].T @ own
        rows.addmm_(matrix[end:, start:end].T, matrix[end:, :end])
        own.copy_(rows)
    return matrix


def solve_(factor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Solve X L L^T = `rows`.

    Args:
        factor: L in the lower triangle of `(n, n)`; the rest is ignored.
        rows: `(d, n)`; overwritten.

    Returns:
        `(d, n)`, in the memory of `rows` if `factor` is larger than a block.
    """
    if len(factor) <= _block(factor):
        return torch.cholesky_solve(rows.T, factor).T
    for start, end in _blocks(factor):
        part = rows[:, start:end]
        part.addmm_(rows[:, :start], factor[start:end, :start].T, alpha=-1)
        part.copy_(solve_triangular(factor[start:end, start:end].T, part, upper=True, left=False))
    for start, end in reversed(list(_blocks(factor))):
        part = rows[:, start:end]
        part.addmm_(rows[:, end:], factor[end:, start:end], alpha=-1)
        part.copy_(solve_triangular(factor[start:end, start:end], part, upper=False, left=False))
    return rows


def ridge_term(matrix: torch.Tensor, ridge: float) -> float:
    """Return `ridge` times the mean diagonal of a second moment `(n, n)`: the value to add to its diagonal.

    A zero matrix gets a tiny positive value, which makes it invertible and the ridge solution the prior, exactly.
    """
    scale = float(matrix.diagonal().double().mean())
    # below the normal numbers of float32 a sum of squares has too few digits to be positive definite
    return ridge * scale if scale > torch.finfo(torch.float32).tiny else 2.0**-40


def fill_(matrix: torch.Tensor) -> torch.Tensor:
    """Copy the lower blocks of a symmetric `(n, n)` to the upper ones, in place; diagonal blocks are already complete."""
    for start, end in _blocks(matrix):
        matrix[:start, start:end] = matrix[start:end, :start].T
    return matrix


def mirror_(matrix: torch.Tensor, *, from_upper: bool = False) -> torch.Tensor:
    """Make `(n, n)` symmetric in place, copying its lower triangle, or the upper one with `from_upper`."""
    lower = matrix.T if from_upper else matrix
    for start, end in _blocks(matrix):
        lower[:start, start:end] = lower[start:end, :start].T
        square = lower[start:end, start:end]
        square.copy_(square.tril() + square.tril(-1).T)
    return matrix


@contextmanager
def exact_products(*dtypes: torch.dtype) -> Iterator[None]:
    """Multiply float32 copies of half-precision numbers on tensor cores if that loses no bit of the factors.

    A GPU's TF32 keeps the 10 fraction bits of float16 and the range of float32, hence also bfloat16; CPU matrix units
    take bfloat16. Both sum in float32. For other `dtypes` the factors stay float32, whatever
    `torch.set_float32_matmul_precision` says. All settings are restored.
    """
    backends: Any = torch.backends
    cuda, cpu = backends.cuda.matmul, backends.mkldnn.matmul
    before = cuda.fp32_precision, cpu.fp32_precision
    cuda.fp32_precision = "tf32" if all(dtype in _HALVES for dtype in dtypes) else "ieee"
    cpu.fp32_precision = "bf16" if all(dtype == torch.bfloat16 for dtype in dtypes) else "ieee"
    try:
        yield
    finally:
        cuda.fp32_precision, cpu.fp32_precision = before


def gram_strips(x: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield the rows and columns of strips that cover the lower triangle of x^T x, for `x` `(tokens, n)`."""
    for start, end in _stretches(0, x.shape[1], _STRIP if x.device.type == "cpu" else _GPU_STRIP):
        yield slice(start, end), slice(0, end)


def add_gram_(total: torch.Tensor, x: torch.Tensor) -> None:
    """Add x^T x of `x` `(tokens, n)` to the lower triangle of `total` `(n, n)`, in the dtype of `total`."""
    wide = factors_of_products(x) if total.dtype == torch.float32 else x.to(total.dtype)
    with exact_products(x.dtype):
        for rows, columns in gram_strips(wide):
            if wide.dtype == total.dtype:
                total[rows, columns].addmm_(wide[:, rows].T, wide[:, columns])
            else:
                total[rows, columns] += product(wide[:, rows].T, wide[:, columns])


def factors_of_products(x: torch.Tensor) -> torch.Tensor:
    """Convert `(tokens, n)` for `product`: to float32, or not at all if the device sums products of halves in float32."""
    return x if x.is_cuda and torch.version.hip is None and x.dtype in _HALVES else x.float()


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Multiply two results of `factors_of_products` of one dtype in float32, within `exact_products`."""
    if left.dtype == torch.float32:
        return left @ right
    return torch.mm(left, right, out_dtype=torch.float32)


def weighted_gram(weight: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """Compute W^T G W in float64 on the device of G, up to the part of the upper triangle that `fill_` completes.

    Args:
        weight: W, `(d, n)`, any float dtype.
        metric: G, symmetric `(d, d)`, any float dtype.
    """
    w, g = weight.to(metric.device).double(), metric.double()
    # untouched pages of an empty tensor take no memory
    gram = torch.empty(w.shape[1], w.shape[1], dtype=torch.float64, device=g.device)
    for start, end in _blocks(gram):
        torch.mm(w[:, start:end].T @ g, w[:, :end], out=gram[start:end, :end])
    return gram


def _block(matrix: torch.Tensor) -> int:
    return _BLOCK if matrix.device.type == "cpu" else _GPU_BLOCK


def _blocks(matrix: torch.Tensor, start: int = 0) -> Iterator[tuple[int, int]]:
    """Yield the bounds of the row blocks of a matrix from `start` on."""
    return _stretches(start, len(matrix), _block(matrix))


def _stretches(start: int, end: int, step: int) -> Iterator[tuple[int, int]]:
    for first in range(start, end, step):
        yield first, min(first + step, end)
