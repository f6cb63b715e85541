"""Sample calibration windows: the same ones for the same text, tokenizer, sizes and seed."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..errors import UsageError
from .text import Text, load_text, parse_weight
from .windows import excerpt_size, token_ids, token_windows

#: bytes per token of a tokenizer's encoding and of the ids; measured: 340
_PER_TOKEN = 360
#: characters that are tokenized to estimate the number of tokens of a text
_GLANCE = 1 << 16
#: one window in this many is held out of refitting and steps, for choices that must not be made on the fitted windows;
#: moments and curves are taken over all
HELD_OUT_EVERY = 8


@dataclass(frozen=True)
class Source:
    """Where calibration windows came from."""

    name: str
    split: str
    sha256: str
    windows: int
    weight: float = 1.0


@dataclass(frozen=True, eq=False)
class Calibration:
    """Calibration windows.

    Attributes:
        ids: int64 `(samples, seq_len)`, each row BOS + `seq_len - 1` text tokens (all text where there is no BOS).
        sources: what they were drawn from.
        seed: of the sampling.
    """

    ids: torch.Tensor
    sources: tuple[Source, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.dtype != torch.long or self.ids.shape[0] < 1 or self.ids.shape[1] < 2:
            raise UsageError(
                f"calibration ids must be int64 of shape (samples, seq_len >= 2), got {self.ids.dtype} "
                f"{tuple(self.ids.shape)}"
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Calibration):
            return NotImplemented
        return torch.equal(self.ids, other.ids) and (self.sources, self.seed) == (other.sources, other.seed)

    @property
    def tokens(self) -> int:
        """Return the number of calibration tokens, BOS included."""
        return self.ids.numel()

    @property
    def held_out(self) -> torch.Tensor:
        """Return the held-out windows, one in eight: int64 `(samples // 8, seq_len)`."""
        return self.ids[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]

    @property
    def fitted(self) -> torch.Tensor:
        """Return all windows that are not held out."""
        keep = torch.arange(len(self.ids)) % HELD_OUT_EVERY != HELD_OUT_EVERY - 1
        return self.ids[keep]

    def record(self) -> list[dict[str, Any]]:
        """Return the sources, JSON-ready."""
        return [asdict(source) for source in self.sources]

    @staticmethod
    def from_ids(ids: torch.Tensor) -> Calibration:
        """Use windows that are tokenized already, int64 `(samples, seq_len)`."""
        return Calibration(ids)

    @staticmethod
    def from_text(
        tokenizer: Any,
        sources: Sequence[Any] | Any,
        *,
        samples: int = 128,
        seq_len: int = 2048,
        seed: int = 0,
        text_column: str = "text",
    ) -> Calibration:
        """Sample `samples` windows of `seq_len` tokens, evenly over each source.

        Args:
            tokenizer: a Hugging Face tokenizer; text is tokenized once, without special tokens.
            sources: names, files or dataset ids as `text.load_text` takes them (training split), optionally weighted as
                `"books.txt=0.7"`; or a `datasets.Dataset` with `text_column`; or an iterable of strings.
            samples: total number of windows, shared between the sources by weight.
            seq_len: tokens per window, BOS included.
            seed: of the choice of windows. Windows never overlap.

        Raises:
            UsageError: for text that is empty or shorter than one window, more windows asked than there are, or
                weights that are not positive.
        """
        return sample_windows(tokenizer, load_weighted_texts(sources, text_column), samples, seq_len, seed)


def sample_windows(
    tokenizer: Any, texts: Sequence[tuple[Text, float]], samples: int, seq_len: int, seed: int
) -> Calibration:
    """Sample as `Calibration.from_text` from loaded texts and their weights."""
    if samples < 1 or seq_len < 2:
        raise UsageError(f"samples={samples} and seq_len={seq_len}: at least 1 window of 2 tokens is needed")
    pools = [token_windows(tokenizer, text, seq_len, samples) for text, _ in texts]
    counts = _shares(samples, [weight for _, weight in texts], [len(pool) for pool in pools], seq_len)
    rng = random.Random(seed)
    rows = [pool[_spread(len(pool), count, rng)] for pool, count in zip(pools, counts, strict=True)]
    ids = torch.stack([rows[s][i] for s, i in _interleaved(counts)])
    records = tuple(
        Source(text.name, text.split, text.sha256, count, weight)
        for (text, weight), count in zip(texts, counts, strict=True)
    )
    return Calibration(ids, records, seed)


def _interleaved(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Order the windows as `(source, row)` with the sources mixed evenly, held-out windows included."""
    spread = sorted((i / max(1, count), s, i) for s, count in enumerate(counts) for i in range(count))
    order, held = [(s, i) for _, s, i in spread], [0] * len(counts)
    for last in range(HELD_OUT_EVERY - 1, len(order), HELD_OUT_EVERY):

        def due(position: int, until: int = last + 1) -> tuple[int, int]:
            source = order[position][0]
            return counts[source] * until - held[source] * HELD_OUT_EVERY * len(order), position

        # the source that has least of its share held out so far
        order.insert(last, order.pop(max(range(last + 1 - HELD_OUT_EVERY, last + 1), key=due)))
        held[order[last][0]] += 1
    return order


def sampling_bytes(tokenizer: Any, texts: Sequence[tuple[Text, float]], samples: int, seq_len: int) -> int:
    """Estimate the peak memory of `sample_windows` in bytes."""
    total = 0
    for text, _ in texts:
        start = text.content[:_GLANCE]
        tokens = len(token_ids(tokenizer, start)) * excerpt_size(text, seq_len, samples) // len(start)
        total += 2 * len(text.content) + _PER_TOKEN * tokens
    return total


def load_weighted_texts(sources: Any, column: str = "text") -> list[tuple[Text, float]]:
    """Load the texts that `Calibration.from_text` draws from, with their weights; raises [`UsageError`] as that does."""
    if isinstance(sources, Mapping):
        raise UsageError(f"this is a mapping of {', '.join(map(str, sources))}, not a text: pass one of them")
    if hasattr(sources, "column_names"):
        if column not in sources.column_names:
            raise UsageError(f"the dataset has no column {column!r}; it has: {', '.join(sources.column_names)}")
        texts = list(sources[column])
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise UsageError(f"row {number + 1} of the dataset holds {text!r:.60} in column {column!r}, which is not text")
        return [(Text("dataset", "train", "\n\n".join(texts)), 1.0)]
    names: Iterable[Any] = [sources] if isinstance(sources, (str, os.PathLike)) else sources
    weighted = [parse_weight(os.fspath(name)) for name in names]
    if not weighted:
        raise UsageError("no calibration text was named: pass --calibration NAME_OR_FILE")
    return [(load_text(name, split="train"), weight) for name, weight in weighted]


def _shares(samples: int, weights: list[float], capacity: list[int], seq_len: int) -> list[int]:
    """Return windows per source, proportional to weight; the others make up for a source that is too short."""
    if sum(capacity) < samples:
        raise UsageError(
            f"the calibration text holds {sum(capacity)} windows of {seq_len} tokens, {samples} are asked for: "
            f"give more text, --samples {sum(capacity)}, or a lower --seq-len"
        )
    counts = [0] * len(weights)
    while (left := samples - sum(counts)) > 0:
        open_ = [i for i, room in enumerate(capacity) if counts[i] < room]
        total = sum(weights[i] for i in open_)
        exact = {i: left * weights[i] / total for i in open_}
        gains = {i: int(exact[i]) for i in open_}
        for i in sorted(open_, key=lambda i: gains[i] - exact[i])[: left - sum(gains.values())]:
            gains[i] += 1
        for i in open_:
            counts[i] = min(capacity[i], counts[i] + gains[i])
    return counts


def _spread(total: int, count: int, rng: random.Random) -> list[int]:
    """Sample one index from each of `count` equal stretches of `range(total)`."""
    edges = [total * i // count for i in range(count + 1)] if count else [0]
    return [rng.randrange(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
