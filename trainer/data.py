"""Draw the training and held-out rows of a recovery from its sources."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..configuration import RecoveryConfig
from ..data import Text, check_token_ids, load_text, parse_weight
from ..errors import UsageError
from .examples import Examples, Row, open_source, tokenized

if TYPE_CHECKING:
    from datasets import Dataset

#: at most one row in this many is held out, of each source and of the training as a whole
_HELD_OUT_SHARE = 20


@dataclass(frozen=True)
class DataSource:
    """One source of training rows; `rows` and `tokens` are those of one epoch."""

    name: str
    split: str
    sha256: str
    weight: float
    rows: int
    tokens: int


@dataclass(frozen=True)
class TrainingData:
    """Rows of one epoch.

    Attributes:
        train: columns `input_ids`, `labels`, and `seq_lengths` if rows are packed.
        held_out: rows that are never trained on, in the same columns; None if the text is too short to spare any.
        sources: the sources that the rows were drawn from.
        packed: whether a row may hold several examples.
    """

    train: Dataset
    held_out: Dataset | None
    sources: tuple[DataSource, ...]
    packed: bool

    def record(self) -> list[dict[str, Any]]:
        """Return the sources in JSON-ready form."""
        return [asdict(source) for source in self.sources]


def load_data(
    tokenizer: Any, config: RecoveryConfig, *, vocabulary: int, seed: int, evaluation: Sequence[str] = ()
) -> TrainingData:
    """Tokenize the sources of `config` and draw the rows of one epoch from them.

    Text is cut into windows of BOS + `seq_len - 1` text tokens, as for calibration. Each row of a dataset with
    `messages`, prompt/completion or Alpaca columns is one example, cut at `seq_len`, with a loss on the assistant's
    turns or on the completion. Several sources share `max_tokens` evenly, or by their weights (`books.txt=0.7`); tokens
    that a short source lacks are drawn from the others, and every source repeats once all are used up.

    Args:
        config: with `seq_len` set.
        vocabulary: rows of the model's embeddings.
        seed: seeds the choice and the order of the rows.
        evaluation: texts that will be evaluated on; training on one of them is refused.

    Raises:
        UsageError: a text is empty, shorter than one window or will be evaluated on, a dataset has no usable columns,
            `messages` are given and the chat template is missing or does not mark the assistant's turns, or the tokenizer
            is larger than the model's embeddings.
    """
    weighted = [parse_weight(source) for source in config.data]
    opened = [open_source(name, config.split, config.streaming) for name, _ in weighted]
    _refuse_evaluated(opened, evaluation)
    limit = config.max_tokens if config.streaming else None
    pools = [tokenized(tokenizer, source, config.seq_len or 0, limit, config.max_tokens) for source in opened]
    for source, pool in zip(opened, pools, strict=True):
        check_token_ids(max(max(row.ids) for row in pool), vocabulary, source.name)
    rng = random.Random(seed)
    held_out = _hold_out(pools, config)
    counts = _token_shares(pools, [weight for _, weight in weighted], config.max_tokens)
    chosen, records = [], []
    for source, pool, tokens, (_, weight) in zip(opened, pools, counts, weighted, strict=True):
        rows = _draw(pool, tokens, rng)
        chosen += rows
        used = sum(len(row.ids) for row in rows)
        records.append(DataSource(source.name, source.split, source.sha256, weight, len(rows), used))
    rng.shuffle(chosen)
    packed = config.packing and any(isinstance(source, Examples) and source.kind != "text" for source in opened)
    return TrainingData(
        _dataset(chosen, config, packed),
        _dataset(held_out, config, packed) if held_out else None,
        tuple(records),
        packed,
    )


def _refuse_evaluated(opened: Iterable[Text | Examples], evaluation: Sequence[str]) -> None:
    evaluated = {text.sha256: text for text in (load_text(name, split="test") for name in evaluation)}
    for source in opened:
        if isinstance(source, Text) and source.sha256 in evaluated:
            raise UsageError(f"{source.name} ({source.split}) will be evaluated on and cannot be trained on: give other text")


def _hold_out(pools: list[list[Row]], config: RecoveryConfig) -> list[Row]:
    """Take the held-out rows, evenly spaced, out of every pool; fewer if the training itself is short."""
    wanted = config.held_out_tokens
    if config.max_tokens is not None:
        wanted = min(wanted, config.max_tokens // _HELD_OUT_SHARE)
    share = wanted // len(pools)
    taken = []
    for pool in pools:
        count = min(share * len(pool) // sum(len(row.ids) for row in pool), len(pool) // _HELD_OUT_SHARE)
        for index in reversed(range(count)):
            taken.append(pool.pop((2 * index + 1) * len(pool) // (2 * count)))
    return taken


def _token_shares(pools: list[list[Row]], weights: list[float], budget: int | None) -> list[int]:
    """Split `budget` over the sources by weight; tokens that a short source lacks come from the others."""
    capacity = [sum(len(row.ids) for row in pool) for pool in pools]
    if budget is None:
        return capacity
    passes, rest = divmod(budget, sum(capacity))
    shares = [0.0] * len(pools)
    open_ = set(range(len(pools)))
    while rest - sum(shares) >= 1 and open_:
        left = rest - sum(shares)
        total = sum(weights[i] for i in open_)
        for i in open_:
            shares[i] = min(capacity[i], shares[i] + left * weights[i] / total)
        open_ = {i for i in open_ if shares[i] < capacity[i]}
    return [passes * size + round(share) for size, share in zip(capacity, shares, strict=True)]


def _draw(pool: list[Row], tokens: int, rng: random.Random) -> list[Row]:
    """Draw rows until they hold `tokens` tokens; no row is drawn twice more often than another."""
    rows: list[Row] = []
    used = 0
    while used < tokens:
        for index in rng.sample(range(len(pool)), len(pool)):
            if used >= tokens:
                break
            rows.append(pool[index])
            used += len(pool[index].ids)
    return rows


def _dataset(rows: list[Row], config: RecoveryConfig, packed: bool) -> Dataset:
    from datasets import Dataset

    columns = {
        "input_ids": [row.ids for row in rows],
        "labels": [row.ids if row.labels is None else row.labels for row in rows],
    }
    dataset = Dataset.from_dict(columns)
    if not packed:
        return dataset
    from trl import pack_dataset

    return pack_dataset(dataset, config.seq_len, "bfd", {"num_proc": None})
