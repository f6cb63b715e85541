"""Compute the cost of removing units by brute force."""

from __future__ import annotations

import torch


def refit_cost(weight: torch.Tensor, h: torch.Tensor, g: torch.Tensor, kept: list[int]) -> float:
    """tr(G dW H dW^T) after an explicit least-squares re-fit of the columns `kept`."""
    change = weight.clone()
    if kept:
        solution = torch.linalg.solve(h[kept][:, kept], h[kept] @ weight.T).T
        change[:, kept] -= solution
    return float((g @ change @ h @ change.T).trace())
