"""TODO."""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: ridge of the optimal-brain-surgeon solve, relative to the mean diagonal of H (Frantar & Alistarh 2022)
RIDGE = 0.01


@dataclass(frozen=True)
class Curve:
    """Removal curve of a block.

    Attributes:
        order: int64 `(n_units,)`, units in the order in which they go.
        cost: float64 `(n_units,)`, `cost[k]` is the cost of removing the first `k + 1` of them.
    """

    order: torch.Tensor
    cost: torch.Tensor

    @staticmethod
    def from_scores(scores: torch.Tensor) -> Curve:
        """Least score first, costs add up."""
        scores = scores.double()
        order = torch.argsort(scores, stable=True)
        return Curve(order, scores[order].cumsum(0))


@dataclass(frozen=True)
class Moments:
    """Second moments at the output projection of one block (`o_proj` or `down_proj`), averaged over tokens.

    Attributes:
        tokens: how many tokens were averaged.
        inputs: H, float32 `(n, n)`, mean of x x^T over the projection's inputs.
        input_mean: float32 `(n,)`, mean of x.
        gradients: G, float32 `(d, d)`, mean of g g^T over the loss gradient at its outputs; None if not measured.
    """

    tokens: int
    inputs: torch.Tensor
    input_mean: torch.Tensor
    gradients: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        """All of them."""
        return [tensor for tensor in (self.inputs, self.input_mean, self.gradients) if tensor is not None]

    def to(self, device: torch.device) -> Moments:
        """The same on another device."""
        gradients = None if self.gradients is None else self.gradients.to(device)
        return Moments(self.tokens, self.inputs.to(device), self.input_mean.to(device), gradients)

    def ridged(self, ridge: float = RIDGE) -> torch.Tensor:
        """H + ridge * mean(diag H) * I in float64; inputs that were always zero get a ridge that costs nothing."""
        h = self.inputs.double()
        h.diagonal().add_(self.added(ridge))
        return h

    def added(self, ridge: float = RIDGE) -> float:
        """What `ridged` adds to the diagonal of H."""
        scale = float(self.inputs.diagonal().double().mean())
        # below the normal numbers of float32 a sum of squares has too few digits to be positive definite
        return ridge * scale if scale > torch.finfo(torch.float32).tiny else 1e-12
