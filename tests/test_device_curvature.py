"""The removal that a GPU does, on the CPU: it ends with the columns and costs of the one that the CPU does."""

from __future__ import annotations

import pytest
import torch

from hf_gqaprune import device_curvature
from hf_gqaprune.curvature import remove_greedily
from hf_gqaprune.factors import fill_, invert_


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


def test_what_stays_is_moved_together_in_its_own_memory() -> None:
    matrix = torch.arange(49.0).view(7, 7)
    stay = torch.tensor([0, 2, 3, 6])
    wanted = matrix[stay][:, stay].clone()
    moved = device_curvature._moved_together(matrix, stay)
    assert torch.equal(moved, wanted) and moved.data_ptr() == matrix.data_ptr()
