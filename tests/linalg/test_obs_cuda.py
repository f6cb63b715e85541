"""The removal that a GPU does, on the CPU: it ends with the columns and costs of the one that the CPU does."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_gqaprune.linalg import obs_cuda as device_curvature
from hf_gqaprune.linalg.obs import remove_greedily
from hf_gqaprune.linalg.symmetric import fill_, invert_


def problem(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """H and A, `(n, n)`; A has a rank below n."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n + 8, n, generator=generator, dtype=torch.float64)
    w = torch.randn(max(1, n // 2), n, generator=generator, dtype=torch.float64)
    return x.T @ x + torch.eye(n), w.T @ w


# around the removals between two updates, and around the sizes at which columns are moved together
@pytest.mark.parametrize("n", [1, 5, 63, 64, 65, 127, 128, 129, 300, 513])
def test_the_same_columns_go_at_the_same_cost(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_curvature, "_FEW", 128)
    monkeypatch.setattr(device_curvature, "_ROWS", 50)
    for seed in range(3):
        h, a = problem(n, seed)
        order, cost = remove_greedily(h, a, torch.arange(n)[:, None])
        found, steps = device_curvature.remove_columns(fill_(invert_(h.clone())), a.clone())
        assert found == order.tolist()
        assert torch.allclose(torch.tensor(steps, dtype=torch.float64).cumsum(0), cost, rtol=1e-10, atol=0)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton comes with torch for a GPU")
def test_the_kernel_removes_what_the_operations_of_torch_remove() -> None:
    """In Triton's interpreter, which a process has to begin with."""
    code = """
import torch
from hf_gqaprune import column_kernel, device_curvature
from hf_gqaprune.factors import fill_, invert_
from test_device_curvature import problem


class Steps(device_curvature._Steps):
    def __init__(self, p, a, count):
        super().__init__(p, a, count)
        self.kernel = column_kernel.Kernel(p, a, self.panels, self.diagonals, self.picked, self.costs)


plain = device_curvature._Steps
for n in (1, 5, 64, 130, 300):
    h, a = problem(n, n)
    inverse = fill_(invert_(h))
    found = []
    for device_curvature._Steps in (plain, Steps):
        found.append(device_curvature.remove_columns(inverse.clone(), a.clone()))
    (order, costs), (expected, wanted) = found
    assert order == expected, n
    torch.testing.assert_close(torch.tensor(costs), torch.tensor(wanted), rtol=1e-5, atol=0)
"""
    run = [sys.executable, "-c", code]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(run, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_stays_is_moved_together_in_its_own_memory() -> None:
    matrix = torch.arange(49.0).view(7, 7)
    stay = torch.tensor([0, 2, 3, 6])
    wanted = matrix[stay][:, stay].clone()
    moved = device_curvature._moved_together(matrix, stay)
    assert torch.equal(moved, wanted) and moved.data_ptr() == matrix.data_ptr()
