"""Compute cross-entropies and divergences of next-token predictions, a slice of the logits at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from ..errors import WorkError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: logits computed at once: 128 MiB in float32, a handful of which are alive together
LOGITS_AT_ONCE = 1 << 25
#: label of a token that is not scored
IGNORED = -100


def rows_at_once(vocabulary: int) -> int:
    """Return how many rows of logits make up `LOGITS_AT_ONCE`, at least one."""
    return max(1, LOGITS_AT_ONCE // vocabulary)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the nats of each label: float32 `(n,)` on the device of the logits, 0 for `IGNORED` labels.

    Args:
        logits: `(n, vocabulary)`, any float dtype.
        labels: int64 `(n,)`, on any device.
    """
    return F.cross_entropy(logits.float(), labels.to(logits.device), reduction="none", ignore_index=IGNORED)


@torch.no_grad()
def token_losses(model: PreTrainedModel, ids: torch.Tensor, first: int) -> torch.Tensor:
    """Sum the nats of the tokens from position `first` on per window: `ids` (n, length) -> float64 (n,).

    A window with any logit that is not finite has a loss that is not finite. The head is applied to a slice of rows at
    a time, because the logits of a batch would take many times the memory of the model.
    """
    decoder: Any = model.get_decoder()
    head: Any = model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings()
    # offloaded weights are on `meta`; accelerate's hooks then move the ids themselves
    device = embeddings.weight.device
    ids = ids.to("cpu" if device.type == "meta" else device)
    hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state  # (n, length, d)
    rows = hidden[:, first - 1 : -1].flatten(0, 1)  # (n * scored, d)
    labels = ids[:, first:].flatten()
    size = rows_at_once(head.weight.shape[0])
    losses = []
    for part, label in zip(rows.split(size), labels.split(size), strict=True):
        logits = head(part).float()
        # nan and inf propagate to the loss, -inf only at the label
        loss = cross_entropy(logits, label).where(logits.amin(-1).isfinite(), torch.inf)
        losses.append(loss.double().cpu())
    return torch.cat(losses).view(len(ids), -1).sum(1)


def loss_gradient(
    hidden: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor, vocabulary: int
) -> torch.Tensor:
    """Differentiate the summed next-token cross-entropy, in nats, with respect to the inputs of the head.

    Args:
        hidden: `(windows, seq_len, hidden)`, after the last norm.
        head: maps `(tokens, hidden)` to logits `(tokens, vocabulary)`.
        ids: int64 `(windows, seq_len)`.

    Returns:
        The gradient, shaped like `hidden`.

    Raises:
        WorkError: the loss is not finite.
    """
    labels = torch.full_like(ids, IGNORED)
    labels[:, :-1] = ids[:, 1:]
    rows = hidden.detach().flatten(0, 1)
    gradient, total = torch.empty_like(rows), torch.zeros((), device=hidden.device)
    size = rows_at_once(vocabulary)
    for part, label, result in zip(rows.split(size), labels.flatten().split(size), gradient.split(size), strict=True):
        loss = cross_entropy(head(part.requires_grad_(True)), label).sum()
        total += loss.detach().to(total.device)
        result.copy_(torch.autograd.grad(loss, part)[0])
    if not bool(torch.isfinite(total)):
        raise WorkError(f"the loss on calibration text is {float(total)}: the model's activations overflow")
    return gradient.view_as(hidden)


def kl_divergence(reference: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """Return KL(reference || model) in nats, `(...)`, of two float32 log-probabilities `(..., outcomes)`."""
    return (reference.exp() * (reference - log_probs)).sum(-1)


@dataclass(frozen=True)
class TopLogProbs:
    """Log-probabilities of the `k` most likely tokens, and of all others together.

    Attributes:
        indices: int64 `(..., k)`, token ids.
        log_probs: float32 `(..., k)`.
        rest: float32 `(...)`, the other tokens' total; -inf if `k` is the whole vocabulary.
    """

    indices: torch.Tensor
    log_probs: torch.Tensor
    rest: torch.Tensor


def top_log_probs(logits: torch.Tensor, k: int, temperature: float = 1.0) -> TopLogProbs:
    """Reduce logits `(..., vocabulary)` of any float dtype to their `k` largest; `k` may exceed the vocabulary."""
    scaled = logits.float() / temperature
    values, indices = scaled.topk(min(k, scaled.shape[-1]), dim=-1)  # (..., k)
    total = scaled.logsumexp(-1, keepdim=True)  # (..., 1)
    return TopLogProbs(indices, values - total, _rest(scaled, indices) - total.squeeze(-1))


def top_kl_divergence(logits: torch.Tensor, reference: TopLogProbs, temperature: float = 1.0) -> torch.Tensor:
    """Return KL(reference || model) per token over the reference's top tokens and everything else as one outcome.

    This is a lower bound of the divergence over the vocabulary (data processing inequality) and equals it if all tokens
    are kept. It is multiplied by temperature**2, which keeps the size of its gradient (Hinton et al. 2015, section 2).

    Args:
        logits: of the model, `(..., vocabulary)`, any float dtype.
        reference: for the same tokens and temperature.

    Returns:
        float32 `(...)`, in nats.
    """
    scaled = logits.float() / temperature
    total = scaled.logsumexp(-1)
    result = kl_divergence(reference.log_probs, scaled.gather(-1, reference.indices) - total.unsqueeze(-1))
    if reference.indices.shape[-1] < scaled.shape[-1]:
        rest = _rest(scaled, reference.indices) - total
        result = result + reference.rest.exp() * (reference.rest - rest)
    return result * temperature**2


def _rest(scaled: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Logsumexp over all tokens but `indices`; subtraction would cancel if the rest is far smaller than the top."""
    return scaled.scatter(-1, indices, -torch.inf).logsumexp(-1)
