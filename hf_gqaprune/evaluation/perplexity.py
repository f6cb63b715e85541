"""Evaluate the perplexity of a model over every token of a text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from ..data import TOKENS_PER_BATCH, Text, check_token_ids, load_text, token_ids
from ..errors import UsageError, WorkError
from ..models import eval_without_grad, token_losses
from ..utils import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

#: exp overflows float64 beyond about 709.8 nats
_MOST_NATS = 709


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity with everything that is needed to reproduce it.

    Attributes:
        value: exp(nats / tokens).
        nats: summed negative log likelihood.
        tokens: scored tokens.
        dataset, split, text_sha256: name, split and hash of the text.
        seq_len: tokens per window, BOS included.
        stride: text tokens between the starts of two windows.
        bos: whether every window starts with the tokenizer's BOS.
    """

    value: float
    nats: float
    tokens: int
    dataset: str
    split: str
    seq_len: int
    stride: int
    bos: bool
    text_sha256: str

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        return asdict(self)

    def conditions(self) -> str:
        """Describe text, windows and token count in one line."""
        start = "BOS" if self.bos else "no BOS"
        return (
            f"{self.dataset} ({self.split}): {self.tokens:,} tokens, seq_len {self.seq_len}, stride {self.stride}, "
            f"{start}, sha256 {self.text_sha256[:12]}"
        )

    def __str__(self) -> str:
        return f"perplexity {self.value:.4f} on {self.conditions()}"


def evaluate_perplexity(
    model: PreTrainedModel,
    tokenizer: Any,
    source: str | Text,
    *,
    seq_len: int | None = None,
    stride: int | None = None,
    drop_tail: bool = False,
    max_chars: int | None = None,
    batch_size: int | None = None,
) -> PerplexityResult:
    """Evaluate the perplexity of `model` on a text: exp(total nats / scored tokens).

    The text is tokenized once without special tokens. A window is BOS + `seq_len - 1` text tokens. Every token is scored
    exactly once, in the first window that contains it, so that a stride below `seq_len - 1` gives later windows context.
    Without a BOS token a window is `seq_len` text tokens, the first of which is only context: every token except the
    first of the text is scored.

    Args:
        model: a causal LM of any float dtype; log-probabilities are computed in float32 and summed in float64.
        tokenizer: its tokenizer.
        source: a name, file or dataset as for `load_text` (its test split), or a `Text`.
        seq_len: tokens per window, BOS included; default min(2048, the model's positions).
        stride: text tokens between the starts of two windows, at most and by default `seq_len - 1` (no overlap).
        drop_tail: leave out a last window that is not full.
        max_chars: number of characters of the text to use, from its start.
        batch_size: windows per forward pass; by default as many as make 8,192 tokens.

    Raises:
        UsageError: the text, `seq_len`, `stride` or `batch_size` is invalid, or the tokenizer is not the model's; raised
            before the model runs.
        WorkError: the logits of a window are not finite; names the window.
    """
    seq_len, stride = window(model.config, seq_len, stride)
    batch_size = max(1, TOKENS_PER_BATCH // seq_len) if batch_size is None else batch_size
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size} must be at least 1")
    text = load_text(source, split="test") if isinstance(source, str) else source
    if max_chars is not None:
        if max_chars < 1:
            raise UsageError(f"max_chars={max_chars} must be at least 1")
        text = replace(text, content=text.content[:max_chars])
    ids = token_ids(tokenizer, text.content)
    bos = tokenizer.bos_token_id
    windows = _windows(len(ids), seq_len, stride, bos is not None, drop_tail)
    if not windows:
        least = (seq_len if bos is None else seq_len - 1) if drop_tail else (2 if bos is None else 1)
        raise UsageError(f"the text {text.name} has {len(ids)} tokens, scoring needs at least {least}: give more text")
    tokens = torch.tensor(ids, dtype=torch.long)
    check_token_ids(int(tokens.max()), model.get_input_embeddings().weight.shape[0], text.name)
    nats, scored, done = 0.0, 0, 0
    with eval_without_grad(model), Progress(text.name, "window", len(windows)) as progress:
        for batch in _batches(windows, batch_size):
            rows = torch.stack([tokens[start:end] for start, end, _ in batch])  # (windows, text tokens)
            first = batch[0][2] - batch[0][0]
            if bos is not None:
                rows = torch.cat([torch.full((len(rows), 1), bos), rows], dim=1)
                first += 1
            losses = token_losses(model, rows, first)
            bad = (~losses.isfinite()).nonzero()
            if len(bad):
                start, end, _ = batch[int(bad[0])]
                raise WorkError(
                    f"window {done + int(bad[0])} of {text.name} (tokens {start} to {end - 1}) has logits that are "
                    f"not finite: load the model in float32 or bfloat16, or check its weights"
                )
            nats += float(losses.sum())
            scored += len(rows) * (rows.shape[1] - first)
            done += len(batch)
            progress.update(len(batch))
    if nats / scored > _MOST_NATS:
        raise WorkError(
            f"the perplexity on {text.name}, exp({nats / scored:.0f}), overflows float64: check the model's weights"
        )
    return PerplexityResult(
        value=math.exp(nats / scored),
        nats=nats,
        tokens=scored,
        dataset=text.name,
        split=text.split,
        seq_len=seq_len,
        stride=stride,
        bos=bos is not None,
        text_sha256=text.sha256,
    )


def window(config: PreTrainedConfig, seq_len: int | None, stride: int | None) -> tuple[int, int]:
    """Return `seq_len` and `stride` with defaults filled in; raise [`UsageError`] if the model cannot run them."""
    limit = int(config.max_position_embeddings)
    seq_len = min(2048, limit) if seq_len is None else seq_len
    if not 2 <= seq_len <= limit:
        raise UsageError(f"seq_len={seq_len} must be from 2 to {limit}, the model's max_position_embeddings")
    stride = seq_len - 1 if stride is None else stride
    if not 1 <= stride < seq_len:
        raise UsageError(f"stride={stride} must be from 1 to {seq_len - 1} text tokens for seq_len={seq_len}")
    return seq_len, stride


def _windows(count: int, seq_len: int, stride: int, bos: bool, drop_tail: bool) -> list[tuple[int, int, int]]:
    """Cut `count` text tokens into windows `(start, end, first scored token)` that score each token once."""
    span = seq_len - bos
    windows: list[tuple[int, int, int]] = []
    start, scored = 0, 0 if bos else 1
    while scored < count:
        end = min(start + span, count)
        if drop_tail and end - start < span:
            break
        windows.append((start, end, scored))
        scored, start = end, start + stride
    return windows


def _batches(windows: list[tuple[int, int, int]], size: int) -> Iterator[list[tuple[int, int, int]]]:
    """Batch neighbouring windows of equal shape, at most `size` at a time, so that none is padded."""
    for _, group in groupby(windows, key=lambda window: (window[1] - window[0], window[2] - window[0])):
        alike = list(group)
        for i in range(0, len(alike), size):
            yield alike[i : i + size]
