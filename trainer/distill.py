"""Distil the predictions of a teacher, reduced to its largest logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from ..models import IGNORED, TopLogProbs, cross_entropy, rows_at_once, top_kl_divergence, top_log_probs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: inputs of the model other than labels
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


def losses(
    logits: torch.Tensor, labels: torch.Tensor, targets: TopLogProbs, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum cross-entropy and divergence over `n` tokens, a slice of the logits at a time.

    Args:
        logits: `(n, vocabulary)`, the student's prediction of each label.
        labels: int64 `(n,)`.

    Returns:
        Two float32 scalars, in nats.
    """
    step = rows_at_once(logits.shape[-1])
    entropy, divergent = [logits.new_zeros((), dtype=torch.float32)], [logits.new_zeros((), dtype=torch.float32)]
    for start in range(0, len(labels), step):
        cut = slice(start, start + step)
        part = TopLogProbs(targets.indices[cut], targets.log_probs[cut], targets.rest[cut])
        arguments = (logits[cut], labels[cut], part, temperature)
        # recompute the float32 copies of the logits in the backward pass instead of keeping them
        if len(labels) > step:
            both = checkpoint(_losses, *arguments, use_reentrant=False)
        else:
            both = _losses(*arguments)
        entropy.append(both[0])
        divergent.append(both[1])
    return torch.stack(entropy).sum(), torch.stack(divergent).sum()


def scored(labels: torch.Tensor) -> torch.Tensor:
    """Return which positions predict a token with a loss: bool `(rows, length - 1)` for labels `(rows, length)`."""
    return labels[:, 1:] != IGNORED


class Teacher:
    """Predict with the dense model in this process."""

    def __init__(self, model: PreTrainedModel, top_k: int, temperature: float) -> None:
        self.model = model.eval().requires_grad_(False)
        self.top_k = top_k
        self.temperature = temperature

    @torch.no_grad()
    def targets(self, inputs: dict[str, Any], mask: torch.Tensor) -> TopLogProbs:
        """Predict the token after each position of `mask` (see `scored`) without ever holding all logits at once."""
        given = {name: inputs[name] for name in MODEL_INPUTS if name in inputs}
        hidden = self.model.get_decoder()(**given, use_cache=False).last_hidden_state[:, :-1][mask]  # (n, d)
        head = self.model.get_output_embeddings()
        step = rows_at_once(head.weight.shape[0])
        parts = [top_log_probs(head(rows), self.top_k, self.temperature) for rows in hidden.split(step)]
        return TopLogProbs(
            torch.cat([part.indices for part in parts]),
            torch.cat([part.log_probs for part in parts]),
            torch.cat([part.rest for part in parts]),
        )


def _losses(
    logits: torch.Tensor, labels: torch.Tensor, targets: TopLogProbs, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return cross_entropy(logits, labels).sum(), top_kl_divergence(logits, targets, temperature).sum()
