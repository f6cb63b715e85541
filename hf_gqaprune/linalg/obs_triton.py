"""Run one removal of `obs_cuda` as a single Triton kernel instead of a dozen torch operations."""

from __future__ import annotations

import torch
import triton
from triton import language as tl

#: columns per program of the kernel
WIDTH = 64
#: minimum number of removals and programs that the kernel is compiled for
ROWS, PROGRAMS = 64, 256


class Kernel:
    """Perform `obs_cuda._Steps._step`, one removal per call.

    After a step every program writes the minimum ratio of its columns, its column and the diagonal of P there. Programs
    cannot wait for each other within a step, so each reads all minima in the next step, from a double buffer.
    """

    def __init__(
        self,
        p: torch.Tensor,
        a: torch.Tensor,
        panels: torch.Tensor,
        diagonals: torch.Tensor,
        picked: torch.Tensor,
        costs: torch.Tensor,
    ) -> None:
        """Prepare the first step.

        Args:
            p, a: float64 `(n, n)`, contiguous; they change only between the last step and the next first one.
            panels: float64 `(2, removals, n)`; each step writes one row of both.
            diagonals: float64 `(2, n)`, of P and A / 2; each step updates them.
            picked, costs: int64 and float64 `(removals,)`; each step writes one element of both.
        """
        n = len(p)
        ratios = diagonals.new_full((triton.cdiv(n, WIDTH), WIDTH), torch.inf)
        ratios.view(-1)[:n] = diagonals[1] / diagonals[0]
        least = ratios.min(1)
        columns = least.indices + WIDTH * torch.arange(len(ratios), device=diagonals.device)
        # a program whose columns are all removed reports infinity for its first one
        inverses = diagonals[0, columns.clamp(max=n - 1)]
        minima = (values.repeat(2, 1) for values in (least.values, columns, inverses))
        self._programs, self._sizes = len(ratios), (len(picked), n)
        self._tensors = (p, a, panels, diagonals, *minima, picked, costs)

    def __call__(self, k: int) -> None:
        """Perform the `k`-th removal since the last update of P and A, counted from 0."""
        count, n = self._sizes
        # powers of two, so that the kernel is compiled once for nearly all sizes
        rows, programs = max(ROWS, triton.next_power_of_2(count)), max(PROGRAMS, triton.next_power_of_2(self._programs))
        _remove[(self._programs,)](*self._tensors, k, count, n, ROWS=rows, WIDTH=WIDTH, PROGRAMS=programs)


@triton.jit(do_not_specialize=["k", "count", "n"])  # type: ignore[untyped-decorator]
def _remove(  # type: ignore[no-untyped-def]
    p, a, panels, diagonals, ratios, columns, inverses, picked, costs, k, count, n,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    own, programs = tl.program_id(0), tl.num_programs(0)
    source, target = (k % 2) * programs, ((k + 1) % 2) * programs
    # the cheapest column
    program = tl.arange(0, PROGRAMS)
    all_ratios = tl.load(ratios + source + program, mask=program < programs, other=float("inf"))
    half_cost, first = tl.min(all_ratios, 0), tl.argmin(all_ratios, 0)
    u = tl.load(columns + source + first)
    scale = 1.0 / tl.sqrt(tl.load(inverses + source + first))
    # its rows in P and A after the removals since the last update
    at = own * WIDTH + tl.arange(0, WIDTH)
    inside = at < n
    row = tl.arange(0, ROWS)
    done = row < k
    s_u = tl.load(panels + row * n + u, mask=done, other=0.0)[:, None]
    r_u = tl.load(panels + (count + row) * n + u, mask=done, other=0.0)[:, None]
    mask = done[:, None] & inside[None, :]
    s = tl.load(panels + row[:, None] * n + at[None, :], mask=mask, other=0.0)
    r = tl.load(panels + (count + row)[:, None] * n + at[None, :], mask=mask, other=0.0)
    p_row = tl.load(p + u * n + at, mask=inside, other=0.0) - tl.sum(s_u * s, 0)
    a_row = tl.load(a + u * n + at, mask=inside, other=0.0) - tl.sum(r_u * s + s_u * r, 0)
    new_s = p_row * scale
    new_r = a_row * scale - half_cost * new_s
    tl.store(panels + k * n + at, new_s, mask=inside)
    tl.store(panels + (count + k) * n + at, new_r, mask=inside)
    # the diagonals after the removal
    p_left = tl.load(diagonals + at, mask=inside, other=1.0) - new_s * new_s
    a_left = tl.load(diagonals + n + at, mask=inside, other=float("inf")) - new_s * new_r
    p_left, a_left = tl.where(at == u, 1.0, p_left), tl.where(at == u, float("inf"), a_left)
    tl.store(diagonals + at, p_left, mask=inside)
    tl.store(diagonals + n + at, a_left, mask=inside)
    # minima for the next step
    left = a_left / p_left
    least = tl.argmin(left, 0)
    tl.store(ratios + target + own, tl.min(left, 0))
    tl.store(columns + target + own, (own * WIDTH + least).to(tl.int64))
    tl.store(inverses + target + own, tl.sum(tl.where(at == own * WIDTH + least, p_left, 0.0), 0))
    if own == 0:
        tl.store(picked + k, u)
        tl.store(costs + k, 2 * half_cost)
