"""Hold removal curves and second moments of a block."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..linalg import ridge_term

#: ridge of the optimal-brain-surgeon solve, relative to the mean diagonal of H (Frantar & Alistarh 2022)
RIDGE = 0.01


@dataclass(frozen=True)
class Curve:
    """Removal curve of a block.

    Attributes:
        order: int64 `(n_units,)`, units in order of removal.
        cost: float64 `(n_units,)`, `cost[k]` is the cost of removing the first `k + 1` units.
    """

    order: torch.Tensor
    cost: torch.Tensor

    @staticmethod
    def from_scores(scores: torch.Tensor) -> Curve:
        """Remove the unit with the lowest score first; costs are cumulative sums of scores `(n_units,)`."""
        scores = scores.double()
        order = torch.argsort(scores, stable=True)
        return Curve(order, scores[order].cumsum(0))


@dataclass(frozen=True)
class Moments:
    """Second moments at the output projection of one block (`o_proj` or `down_proj`), averaged over tokens.

    Attributes:
        tokens: number of tokens averaged over.
        inputs: H, float32 `(n, n)`, mean of x x^T over the projection's inputs.
        input_mean: float32 `(n,)`, mean of x.
        gradients: G, float32 `(d, d)`, mean of g g^T over the loss gradient at its outputs; None if not measured.
    """

    tokens: int
    inputs: torch.Tensor
    input_mean: torch.Tensor
    gradients: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        """Return every tensor that is present."""
        return [tensor for tensor in (self.inputs, self.input_mean, self.gradients) if tensor is not None]

    def to(self, device: torch.device) -> Moments:
        """Return a copy on `device`."""
        gradients = None if self.gradients is None else self.gradients.to(device)
        return Moments(self.tokens, self.inputs.to(device), self.input_mean.to(device), gradients)

    def ridged(self) -> torch.Tensor:
        """Return H + `RIDGE` * mean(diag H) * I in float64 (see `ridge_term`)."""
        h = self.inputs.double()
        h.diagonal().add_(ridge_term(self.inputs, RIDGE))
        return h
