"""TODO."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from ..errors import WorkError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCORED_LOGITS = 2**25
#: 128 MiB in float32, of which a handful are alive at once
LOGITS_AT_ONCE = 1 << 25
#: the target of a token that nothing follows
IGNORED = -100


@torch.no_grad()
def token_losses(model: PreTrainedModel, ids: torch.Tensor, first: int) -> torch.Tensor:
    """Nats of the tokens from position `first` on, summed per window: `ids` (n, length) -> float64 (n,).

    Not finite where any logit of the window is not. The head sees a few rows at a time: the logits of a batch would take
    many times the memory of the model.
    """
    decoder: Any = model.get_decoder()
    head: Any = model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings()
    # offloaded weights are on `meta`; accelerate's hooks then move the ids themselves
    device = embeddings.weight.device
    ids = ids.to("cpu" if device.type == "meta" else device)
    hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state  # (n, length, d)
    rows = hidden[:, first - 1 : -1].flatten(0, 1)  # (n * scored, d)
    targets = ids[:, first:].flatten()
    size = max(1, SCORED_LOGITS // head.weight.shape[0])
    losses = []
    for part, target in zip(rows.split(size), targets.split(size), strict=True):
        logits = head(part).float()
        loss = F.cross_entropy(logits, target.to(logits.device), reduction="none")
        # nan and inf reach the loss by themselves, -inf only where it is the target's
        losses.append(loss.where(logits.amin(-1).isfinite(), torch.inf).double().cpu())
    return torch.cat(losses).view(len(ids), -1).sum(1)


def loss_gradient(
    hidden: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor, vocabulary: int
) -> torch.Tensor:
    """Of the summed cross-entropy of the next token, in nats, with respect to what the head reads.

    The logits of as many tokens as make `LOGITS_AT_ONCE` are in memory at a time.

    Args:
        hidden: `(windows, seq_len, hidden)`, after the last norm.
        head: gives the logits, `(tokens, hidden)` -> `(tokens, vocabulary)`.
        ids: int64 `(windows, seq_len)`.

    Returns:
        As `hidden`.

    Raises:
        WorkError: the loss is not finite.
    """
    following = torch.full_like(ids, IGNORED)
    following[:, :-1] = ids[:, 1:]
    rows = hidden.detach().flatten(0, 1)
    gradient, total = torch.empty_like(rows), torch.zeros((), device=hidden.device)
    step = max(1, LOGITS_AT_ONCE // vocabulary)
    for part, wanted, found in zip(
        rows.split(step), following.flatten().split(step), gradient.split(step), strict=True
    ):
        logits = head(part.requires_grad_(True)).float()
        loss = F.cross_entropy(logits, wanted.to(logits.device), reduction="sum", ignore_index=IGNORED)
        total += loss.detach().to(total.device)
        found.copy_(torch.autograd.grad(loss, part)[0])
    if not bool(torch.isfinite(total)):
        raise WorkError(f"the loss on calibration text is {float(total)}: the model's activations overflow")
    return gradient.view_as(hidden)
