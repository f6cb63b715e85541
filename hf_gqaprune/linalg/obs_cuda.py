"""Remove single columns by Optimal Brain Surgeon on a GPU, without synchronising with the host at each step."""

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
#: while more columns than this remain, they are compacted whenever a third has been removed
_FEW = 2048
#: rows compacted at once
_ROWS = 1024


def remove_columns(p: torch.Tensor, a: torch.Tensor) -> tuple[list[int], list[float]]:
    """Remove units of one column like `obs.remove_greedily`, up to rounding.

    Args:
        p: H^-1, float64 `(n, n)` with both triangles; overwritten.
        a: A, float64 `(n, n)` with both triangles; overwritten.

    Returns:
        The columns in order of removal, and the cost of each.
    """
    p, a = p.contiguous(), a.contiguous()
    left = torch.arange(len(p), device=p.device)
    order, costs = [], []
    while n := len(left):
        steps = _Steps(p, a, min(_LAZY, n))
        for _ in range(max(1, (n if n <= _FEW else n // 3) // _LAZY)):
            steps.run()
            order.append(left[steps.picked])
            costs.append(steps.costs.clone())
        kept = (steps.diagonals[1] < math.inf).nonzero()[:, 0]
        left = left[kept]
        p, a = (_compacted(matrix, kept) for matrix in (p, a))
    return torch.cat(order).cpu().tolist(), torch.cat(costs).cpu().tolist()


class _Steps:
    """Alternate a batch of removals and the update of P and A; on CUDA the removals are captured in a graph.

    Rows and columns of removed units keep their position and are zero up to rounding.

    Attributes:
        picked: int64 `(count,)`, the columns that `run` has removed.
        costs: float64 `(count,)`, the cost of each.
        diagonals: float64 `(2, n)`, of P and of A / 2; 1 and infinity for removed columns.
    """

    def __init__(self, p: torch.Tensor, a: torch.Tensor, count: int) -> None:
        self.p, self.a = p, a
        self.diagonals = torch.stack((p.diagonal(), a.diagonal() / 2))
        self.picked = torch.zeros(count, dtype=torch.int64, device=p.device)
        self.costs = p.new_empty(count)
        # the rows S and R of `obs._pick`
        self.panels = p.new_empty(2, count, len(p))
        self.rows = p.new_empty(2, len(p))
        self.removed = p.new_tensor([[1.0], [math.inf]])
        self.kernel: Kernel | None = None
        if p.device.type == "cuda" and _kernels():
            from .obs_triton import Kernel

            self.kernel = Kernel(p, a, self.panels, self.diagonals, self.picked, self.costs)
        self.runs = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def run(self) -> None:
        """Remove the cheapest columns one after the other, then update P and A."""
        if self.p.device.type == "cuda":
            with torch.cuda.device(self.p.device):
                self._replay()
        else:
            self._pick()
        s, r = self.panels
        self.p.addmm_(s.T, s, alpha=-1)
        self.a.addmm_(self.panels.flatten(0, 1).T, torch.cat((r, s)), alpha=-1)

    def _replay(self) -> None:
        """Run `_pick`, capturing it in a graph at the second call."""
        self.runs += 1
        if self.runs == 2:
            self.graph = torch.cuda.CUDAGraph()
            # another thread may be copying earlier results
            with torch.cuda.graph(self.graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
                self._pick()
        if self.graph is None:
            self._pick()
        else:
            self.graph.replay()

    def _pick(self) -> None:
        step = self.kernel or self._step
        for k in range(len(self.picked)):
            step(k)

    def _step(self, k: int) -> None:
        """Do one step of `obs._pick` with the column index in a tensor."""
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
        self.diagonals.index_copy_(1, u, self.removed)


@functools.cache
def _kernels() -> bool:
    """Return whether Triton, a C compiler and the Python headers that it builds its launchers with are installed."""
    named = os.environ.get("CC")
    compiler = shutil.which(named) if named else shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_path("include"), "Python.h")
    return importlib.util.find_spec("triton") is not None and compiler is not None and header.is_file()


def _compacted(matrix: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Move the ascending rows and columns `kept` of a contiguous `(n, n)` to the front of its memory: `(k, k)`."""
    k = len(kept)
    target = matrix.view(-1)[: k * k].view(k, k)
    # row i comes from row i or a later one, so that no row is overwritten before it is read
    for rows, some in zip(target.split(_ROWS), kept.split(_ROWS), strict=True):
        rows.copy_(matrix.index_select(0, some).index_select(1, kept))
    return target
