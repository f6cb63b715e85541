"""`curvature`'s removal of single columns on a GPU: the next one is found there, and no step waits for the host."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import shutil
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .obs_triton import Kernel

#: removals between two matrix-matrix updates
_LAZY = 64
#: columns down to which those that are left are moved together whenever a third is gone
_FEW = 2048
#: rows that are moved at once
_ROWS = 1024


def remove_columns(p: torch.Tensor, a: torch.Tensor) -> tuple[list[int], list[float]]:
    """`curvature.remove_greedily` for units of one column, up to rounding.

    Args:
        p: H^-1, float64 `(n, n)` with both triangles, used up like `a`.
        a: A, float64 `(n, n)` with both triangles.

    Returns:
        The columns in order of removal, and the cost of each.
    """
    p, a = p.contiguous(), a.contiguous()
    left = torch.arange(len(p), device=p.device)
    order, costs = [], []
    while n := len(left):
        steps = _Steps(p, a, min(_LAZY, n))
        for _ in range(max(1, (n if n <= _FEW else n // 3) // _LAZY)):
            steps.take()
            order.append(left[steps.picked])
            costs.append(steps.costs.clone())
        stay = (steps.diagonals[1] < math.inf).nonzero()[:, 0]
        left = left[stay]
        p, a = (_moved_together(matrix, stay) for matrix in (p, a))
    return torch.cat(order).cpu().tolist(), torch.cat(costs).cpu().tolist()


class _Steps:
    """Some removals and then the update, again and again; on CUDA the removals are recorded once and played again.

    Rows and columns of what is gone stay where they are, zero but for rounding.

    Attributes:
        picked: int64 `(count,)`, the columns that `take` has removed.
        costs: float64 `(count,)`.
        diagonals: float64 `(2, n)`, of P and of A / 2; 1 and infinity where the column is gone.
    """

    def __init__(self, p: torch.Tensor, a: torch.Tensor, count: int) -> None:
        self.p, self.a = p, a
        self.diagonals = torch.stack((p.diagonal(), a.diagonal() / 2))
        self.picked = torch.zeros(count, dtype=torch.int64, device=p.device)
        self.costs = p.new_empty(count)
        # the rows S and R of `curvature._pick`
        self.panels = p.new_empty(2, count, len(p))
        self.rows = p.new_empty(2, len(p))
        self.gone = p.new_tensor([[1.0], [math.inf]])
        self.kernel: Kernel | None = None
        if p.device.type == "cuda" and _kernels():
            from .obs_triton import Kernel

            self.kernel = Kernel(p, a, self.panels, self.diagonals, self.picked, self.costs)
        self.taken = 0
        self.recorded: torch.cuda.CUDAGraph | None = None

    def take(self) -> None:
        """Remove the columns that cost least, one after the other, and bring P and A up to date."""
        if self.p.device.type == "cuda":
            with torch.cuda.device(self.p.device):
                self._play()
        else:
            self._pick()
        s, r = self.panels
        self.p.addmm_(s.T, s, alpha=-1)
        self.a.addmm_(self.panels.flatten(0, 1).T, torch.cat((r, s)), alpha=-1)

    def _play(self) -> None:
        """`_pick`, recorded at the second time."""
        self.taken += 1
        if self.taken == 2:
            self.recorded = torch.cuda.CUDAGraph()
            # another thread may be writing what was measured before
            with torch.cuda.graph(self.recorded, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
                self._pick()
        if self.recorded is None:
            self._pick()
        else:
            self.recorded.replay()

    def _pick(self) -> None:
        step = self.kernel or self._step
        for k in range(len(self.picked)):
            step(k)

    def _step(self, k: int) -> None:
        """`curvature._pick`'s one step with the column as a tensor."""
        ratios = self.diagonals[1] / self.diagonals[0]
        u = self.picked[k : k + 1]
        torch.argmin(ratios, 0, keepdim=True, out=u)
        half_cost, scale = ratios.index_select(0, u), self.diagonals[0].index_select(0, u).rsqrt_()
        torch.mul(half_cost, 2, out=self.costs[k : k + 1])
        for row, matrix in zip(self.rows.split(1), (self.p, self.a), strict=True):
            torch.index_select(matrix, 0, u, out=row)
        if k:
            s, r = self.panels[:, :k]
            s_u, r_u = s.index_select(1, u)[:, 0], r.index_select(1, u)[:, 0]
            self.rows[0].addmv_(s.T, s_u, alpha=-1)
            self.rows[1].addmv_(s.T, r_u, alpha=-1).addmv_(r.T, s_u, alpha=-1)
        new = self.panels[:, k]
        torch.mul(self.rows, scale, out=new)
        new[1].addcmul_(new[0], half_cost, value=-1)
        self.diagonals.addcmul_(new, new[0], value=-1)
        self.diagonals.index_copy_(1, u, self.gone)


@functools.cache
def _kernels() -> bool:
    """Whether Triton, which comes with torch for a GPU on Linux, is there, and what it builds its launchers with."""
    named = os.environ.get("CC")
    compiler = shutil.which(named) if named else shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_path("include"), "Python.h")
    return importlib.util.find_spec("triton") is not None and compiler is not None and header.is_file()


def _moved_together(matrix: torch.Tensor, stay: torch.Tensor) -> torch.Tensor:
    """The rows and columns `stay`, rising, of a contiguous `(n, n)`: `(k, k)` in the front of its memory."""
    k = len(stay)
    target = matrix.view(-1)[: k * k].view(k, k)
    # row i comes from row i or one behind it, so that nothing is written over before it was read
    for rows, some in zip(target.split(_ROWS), stay.split(_ROWS), strict=True):
        rows.copy_(matrix.index_select(0, some).index_select(1, stay))
    return target
