"""One removal of `device_curvature` as a single Triton kernel, where the operations of torch take a dozen."""

from __future__ import annotations

import torch
import triton
from triton import language as tl

#: columns that one program of the kernel works on
WIDTH = 64
#: removals, and programs, that it is made for at least
ROWS, PROGRAMS = 64, 256


class Kernel:
    """`device_curvature._Steps._step`, one removal after the other.

    Every program says after a step which of its columns has the least ratio, and what P is there. Programs cannot wait for
    each other within a step, so that each one reads in the next what all have said, and says it in another place.
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
            p, a: float64 `(n, n)`, contiguous, which change between the last step and the first one only.
            panels: float64 `(2, removals, n)`; a step writes one row of each.
            diagonals: float64 `(2, n)`, of P and A / 2, which steps bring up to date.
            picked: int64 `(removals,)`, like `costs`, float64 `(removals,)`; a step writes one number of each.
        """
        n = len(p)
        ratios = diagonals.new_full((triton.cdiv(n, WIDTH), WIDTH), torch.inf)
        ratios.view(-1)[:n] = diagonals[1] / diagonals[0]
        least = ratios.min(1)
        columns = least.indices + WIDTH * torch.arange(len(ratios), device=diagonals.device)
        # a program whose columns are all gone says infinity of its first one
        inverses = diagonals[0, columns.clamp(max=n - 1)]
        said = (values.repeat(2, 1) for values in (least.values, columns, inverses))
        self._programs, self._sizes = len(ratios), (len(picked), n)
        self._tensors = (p, a, panels, diagonals, *said, picked, costs)

    def __call__(self, k: int) -> None:
        """The `k`-th removal since P and A were brought up to date, from 0."""
        count, n = self._sizes
        # sizes are not part of it where they need not be: it is compiled once for nearly all of them
        rows, programs = max(ROWS, triton.next_power_of_2(count)), max(PROGRAMS, triton.next_power_of_2(self._programs))
        _remove[(self._programs,)](*self._tensors, k, count, n, ROWS=rows, WIDTH=WIDTH, PROGRAMS=programs)


@triton.jit(do_not_specialize=["k", "count", "n"])
def _remove(  # type: ignore[no-untyped-def]
    p, a, panels, diagonals, ratios, columns, inverses, picked, costs, k, count, n,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    own, programs = tl.program_id(0), tl.num_programs(0)
    heard, told = (k % 2) * programs, ((k + 1) % 2) * programs
    # the column that costs least of all
    speaker = tl.arange(0, PROGRAMS)
    all_ratios = tl.load(ratios + heard + speaker, mask=speaker < programs, other=float("inf"))
    half_cost, first = tl.min(all_ratios, 0), tl.argmin(all_ratios, 0)
    u = tl.load(columns + heard + first)
    scale = 1.0 / tl.sqrt(tl.load(inverses + heard + first))
    # what the removals since the last update have made of its rows in P and A
    at = own * WIDTH + tl.arange(0, WIDTH)
    inside = at < n
    row = tl.arange(0, ROWS)
    done = row < k
    s_u = tl.load(panels + row * n + u, mask=done, other=0.0)[:, None]
    r_u = tl.load(panels + (count + row) * n + u, mask=done, other=0.0)[:, None]
    there = done[:, None] & inside[None, :]
    s = tl.load(panels + row[:, None] * n + at[None, :], mask=there, other=0.0)
    r = tl.load(panels + (count + row)[:, None] * n + at[None, :], mask=there, other=0.0)
    p_row = tl.load(p + u * n + at, mask=inside, other=0.0) - tl.sum(s_u * s, 0)
    a_row = tl.load(a + u * n + at, mask=inside, other=0.0) - tl.sum(r_u * s + s_u * r, 0)
    new_s = p_row * scale
    new_r = a_row * scale - half_cost * new_s
    tl.store(panels + k * n + at, new_s, mask=inside)
    tl.store(panels + (count + k) * n + at, new_r, mask=inside)
    # the diagonals without it
    p_left = tl.load(diagonals + at, mask=inside, other=1.0) - new_s * new_s
    a_left = tl.load(diagonals + n + at, mask=inside, other=float("inf")) - new_s * new_r
    p_left, a_left = tl.where(at == u, 1.0, p_left), tl.where(at == u, float("inf"), a_left)
    tl.store(diagonals + at, p_left, mask=inside)
    tl.store(diagonals + n + at, a_left, mask=inside)
    # for the next step
    left = a_left / p_left
    least = tl.argmin(left, 0)
    tl.store(ratios + told + own, tl.min(left, 0))
    tl.store(columns + told + own, (own * WIDTH + least).to(tl.int64))
    tl.store(inverses + told + own, tl.sum(tl.where(at == own * WIDTH + least, p_left, 0.0), 0))
    if own == 0:
        tl.store(picked + k, u)
        tl.store(costs + k, 2 * half_cost)
