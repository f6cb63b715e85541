"""Tokenize text and cut it into windows, and windows into batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..errors import UsageError
from ..utils import CPU
from .text import Text

#: tokens in one forward pass; fixed, so that results never depend on how much memory there is
TOKENS_PER_BATCH = 8192
#: characters up to which a text is tokenized as a whole, of a longer one those of one part, and per token to be sure of enough
_WHOLE, _PART, _CHARS_PER_TOKEN = 1 << 24, 1 << 20, 32
#: half a gigabyte in float32
LOGITS_PER_BATCH = 1 << 27


def split_batches(ids: torch.Tensor, vocabulary: int) -> Iterator[torch.Tensor]:
    """Split int64 `(samples, seq_len)` into batches of at least one row; no batches for no rows.

    A batch has about `TOKENS_PER_BATCH` tokens, or fewer where their logits would be more than `LOGITS_PER_BATCH`.
    """
    tokens = min(TOKENS_PER_BATCH, LOGITS_PER_BATCH // vocabulary)
    if len(ids):
        yield from ids.split(max(1, tokens // ids.shape[1]))


def token_windows(tokenizer: Any, text: Text, seq_len: int, wanted: int) -> torch.Tensor:
    """Tokenize a text without special tokens and cut it into disjoint windows: int64 `(n, seq_len)`, each BOS + text tokens.

    Of a text longer than `excerpt_size`, evenly spaced parts are tokenized one by one, as long as they hold the `wanted`
    windows. Raises [`UsageError`] for text that is empty or shorter than one window.
    """
    if not text.content.strip():
        raise UsageError(f"the text of {text.name} is empty")
    size = excerpt_size(text, seq_len, wanted)
    if size < len(text.content):
        count = -(-size // _PART)
        starts = [index * len(text.content) // count for index in range(count)]
        # of a word that a part begins in, the rest is left out
        parts = (token_ids(tokenizer, text.content[start : start + _PART].partition(" ")[2]) for start in starts)
        windows = [cut_windows(tokenizer, part, seq_len, text.name) for part in parts if len(part) >= seq_len]
        if sum(map(len, windows)) >= wanted:
            return torch.cat(windows)
    return cut_windows(tokenizer, token_ids(tokenizer, text.content), seq_len, text.name)


def excerpt_size(text: Text, seq_len: int, wanted: int) -> int:
    """Return how many characters of a text are tokenized for `wanted` windows: all, unless it is very long."""
    return min(len(text.content), max(_WHOLE, _CHARS_PER_TOKEN * seq_len * wanted))


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenize a text without special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False, return_attention_mask=False)["input_ids"]
    return ids


def check_token_ids(largest: int, embeddings: int, name: str) -> None:
    """Raise [`UsageError`] if the `largest` token id of the text `name` is beyond the model's `embeddings` rows."""
    if largest >= embeddings:
        raise UsageError(
            f"token {largest} of {name} is beyond the model's {embeddings} embeddings: give the model's own tokenizer"
        )


def cut_windows(tokenizer: Any, tokens: list[int], seq_len: int, name: str) -> torch.Tensor:
    """Cut tokens into disjoint windows as `token_windows`; raises [`UsageError`], naming the text, if there are too few."""
    bos = tokenizer.bos_token_id
    span = seq_len - (bos is not None)
    count = len(tokens) // span
    if not count:
        raise UsageError(
            f"{name} has {len(tokens)} tokens, fewer than one window of {span}: give more text or lower --seq-len"
        )
    windows = torch.tensor(tokens[: count * span], dtype=torch.long).view(count, span)
    if bos is None:
        return windows
    return torch.cat([torch.full((count, 1), bos), windows], dim=1)


def layer_batches(ids: torch.Tensor, vocabulary: int, device: torch.device) -> list[torch.Tensor]:
    """Split int64 `(samples, seq_len)` into batches for a pass layer by layer.

    No logits of a whole batch are computed there, so that on a GPU, which small batches leave idle, they set no limit; on
    the CPU the batches are those of a pass through the whole model.
    """
    return list(split_batches(ids, vocabulary if device == CPU else 1))


def refit_batches(
    fitted: torch.Tensor, held_out: torch.Tensor, vocabulary: int, device: torch.device
) -> tuple[list[torch.Tensor], list[bool]]:
    """Return fitted and then held-out batches, and a flag for each whether it is held out."""
    first, second = (layer_batches(ids, vocabulary, device) for ids in (fitted, held_out))
    return first + second, [False] * len(first) + [True] * len(second)
