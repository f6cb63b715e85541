"""What a teacher predicts, cut to its largest logits, goes in; the divergence of a student from it comes out.

The logits that are not kept count as one outcome, "something else". What is minimised is then the exact KL divergence
between the two coarsened distributions, a lower bound of the full one that is reached when all logits are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: logits that are held in float32 at once
_LOGITS_AT_ONCE = 1 << 25
#: what the model is given besides labels
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True)
class Targets:
    """Log-probabilities of the teacher for `n` tokens, at the temperature of the distillation.

    Attributes:
        indices: int64 `(n, k)`, the kept tokens of the vocabulary.
        log_probs: float32 `(n, k)`.
        rest: float32 `(n,)`, of all the others together; -inf where all are kept.
    """

    indices: torch.Tensor
    log_probs: torch.Tensor
    rest: torch.Tensor


def top_logits(logits: torch.Tensor, k: int, temperature: float = 1.0) -> Targets:
    """`Targets` from logits `(n, vocabulary)` of any float dtype; `k` may exceed the vocabulary."""
    scaled = logits.float() / temperature
    values, indices = scaled.topk(min(k, scaled.shape[-1]), dim=-1)  # (n, k)
    total = scaled.logsumexp(-1, keepdim=True)  # (n, 1)
    return Targets(indices, values - total, _rest(scaled, indices) - total.squeeze(-1))


def divergence(logits: torch.Tensor, targets: Targets, temperature: float = 1.0) -> torch.Tensor:
    """KL(teacher || student) of each token, times temperature**2 so that its gradient keeps its size.

    Args:
        logits: the student's, `(n, vocabulary)`.
        targets: the teacher's, for the same tokens and temperature.

    Returns:
        float32 `(n,)`, in nats.

    The factor is that of Hinton et al., "Distilling the knowledge in a neural network" (2015), section 2.
    """
    scaled = logits.float() / temperature
    total = scaled.logsumexp(-1)  # (n,)
    kept = scaled.gather(-1, targets.indices) - total.unsqueeze(-1)  # (n, k)
    result = (targets.log_probs.exp() * (targets.log_probs - kept)).sum(-1)
    if targets.indices.shape[-1] < scaled.shape[-1]:
        rest = _rest(scaled, targets.indices) - total
        result = result + targets.rest.exp() * (targets.rest - rest)
    return result * temperature**2


def losses(
    logits: torch.Tensor, labels: torch.Tensor, targets: Targets, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy and summed divergence of `n` tokens, a slice of the logits at a time.

    Args:
        logits: `(n, vocabulary)`, the student's prediction of each label.
        labels: int64 `(n,)`.
    """
    step = max(1, _LOGITS_AT_ONCE // logits.shape[-1])
    entropy, divergent = [logits.new_zeros((), dtype=torch.float32)], [logits.new_zeros((), dtype=torch.float32)]
    for start in range(0, len(labels), step):
        cut = slice(start, start + step)
        part = Targets(targets.indices[cut], targets.log_probs[cut], targets.rest[cut])
        arguments = (logits[cut], labels[cut], part, temperature)
        # float32 copies of the logits are recomputed in the backward pass, not kept
        if len(labels) > step:
            both = checkpoint(_losses, *arguments, use_reentrant=False)
        else:
            both = _losses(*arguments)
        entropy.append(both[0])
        divergent.append(both[1])
    return torch.stack(entropy).sum(), torch.stack(divergent).sum()


def scored(labels: torch.Tensor) -> torch.Tensor:
    """Which positions predict a token that counts: bool `(rows, length - 1)` of labels `(rows, length)`."""
    return labels[:, 1:] != -100


class Teacher:
    """The dense model in this process."""

    def __init__(self, model: PreTrainedModel, top_k: int, temperature: float) -> None:
        self.model = model.eval().requires_grad_(False)
        self.top_k = top_k
        self.temperature = temperature

    @torch.no_grad()
    def targets(self, inputs: dict[str, Any], mask: torch.Tensor) -> Targets:
        """What the model predicts after the positions of `mask` (`scored`); the logits are never held all at once."""
        given = {name: inputs[name] for name in MODEL_INPUTS if name in inputs}
        hidden = self.model.get_decoder()(**given, use_cache=False).last_hidden_state[:, :-1][mask]  # (n, d)
        head = self.model.get_output_embeddings()
        step = max(1, _LOGITS_AT_ONCE // head.weight.shape[0])
        parts = [top_logits(head(rows), self.top_k, self.temperature) for rows in hidden.split(step)]
        return Targets(
            torch.cat([part.indices for part in parts]),
            torch.cat([part.log_probs for part in parts]),
            torch.cat([part.rest for part in parts]),
        )


def _losses(
    logits: torch.Tensor, labels: torch.Tensor, targets: Targets, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    entropy = F.cross_entropy(logits.float(), labels, reduction="sum")
    return entropy, divergence(logits, targets, temperature).sum()


def _rest(scaled: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Logsumexp over all but `indices`, not by subtraction: what is left may be far smaller than what is kept."""
    return scaled.scatter(-1, indices, -torch.inf).logsumexp(-1)
