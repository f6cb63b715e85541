"""The removal written for a GPU, run on the CPU: it chooses the same columns at the same costs as the one for the CPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_gqaprune.linalg import obs_cuda
from hf_gqaprune.linalg.obs import remove_greedily
from hf_gqaprune.linalg.symmetric import fill_, invert_


def problem(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """H and A, `(n, n)`; A has a rank below n."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n + 8, n, generator=generator, dtype=torch.float64)
    w = torch.randn(max(1, n // 2), n, generator=generator, dtype=torch.float64)
    return x.T @ x + torch.eye(n), w.T @ w


# around the removals between two updates, and around the sizes at which columns are compacted
@pytest.mark.parametrize("n", [1, 5, 63, 64, 65, 127, 128, 129, 300, 513])
def test_the_same_columns_are_removed_at_the_same_cost(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(obs_cuda, "_FEW", 128)
    monkeypatch.setattr(obs_cuda, "_ROWS", 50)
    for seed in range(3):
        h, a = problem(n, seed)
        order, cost = remove_greedily(h, a, torch.arange(n)[:, None])
        found, steps = obs_cuda.remove_columns(fill_(invert_(h.clone())), a.clone())
        assert found == order.tolist()
        assert torch.allclose(torch.tensor(steps, dtype=torch.float64).cumsum(0), cost, rtol=1e-10, atol=0)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton comes with torch for a GPU")
def test_the_kernel_removes_what_the_operations_of_torch_remove() -> None:
    """In Triton's interpreter, which a process has to begin with."""
    code = """
import torch
from hf_gqaprune.linalg import obs_cuda, obs_triton
from hf_gqaprune.linalg.symmetric import fill_, invert_
from test_obs_cuda import problem


class Steps(obs_cuda._Steps):
    def __init__(self, p, a, count):
        super().__init__(p, a, count)
        self.kernel = obs_triton.Kernel(p, a, self.panels, self.diagonals, self.picked, self.costs)


plain = obs_cuda._Steps
for n in (1, 5, 64, 130, 300):
    h, a = problem(n, n)
    inverse = fill_(invert_(h))
    found = []
    for obs_cuda._Steps in (plain, Steps):
        found.append(obs_cuda.remove_columns(inverse.clone(), a.clone()))
    (order, costs), (expected, wanted) = found
    assert order == expected, n
    torch.testing.assert_close(torch.tensor(costs), torch.tensor(wanted), rtol=1e-5, atol=0)
"""
    run = [sys.executable, "-c", code]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(run, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_kept_columns_are_compacted_in_place() -> None:
    matrix = torch.arange(49.0).view(7, 7)
    kept = torch.tensor([0, 2, 3, 6])
    wanted = matrix[kept][:, kept].clone()
    moved = obs_cuda._compacted(matrix, kept)
    assert torch.equal(moved, wanted) and moved.data_ptr() == matrix.data_ptr()
