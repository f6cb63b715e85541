"""Compute costs and divergences by brute force."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def refit_cost(weight: torch.Tensor, h: torch.Tensor, g: torch.Tensor, kept: list[int]) -> float:
    """tr(G dW H dW^T) after an explicit least-squares re-fit of the columns `kept`."""
    change = weight.clone()
    if kept:
        solution = torch.linalg.solve(h[kept][:, kept], h[kept] @ weight.T).T
        change[:, kept] -= solution
    return float((g @ change @ h @ change.T).trace())


def full_divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(teacher || student) per token over the whole vocabulary, times temperature**2."""
    q, p = (F.log_softmax(logits / temperature, -1) for logits in (student, teacher))
    return F.kl_div(q, p, log_target=True, reduction="none").sum(-1) * temperature**2
