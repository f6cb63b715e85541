"""Names of texts and datasets go in; rows of token ids come out, ready for trl's `SFTTrainer`."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from ..configuration import RecoveryConfig
from ..data import NAMED, TABLES, Text, cut_windows, load_text, open_dataset, parse_weight, token_ids
from ..errors import UsageError, unknown
from ..models import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset

#: of each source, and of the training in all, at most one row in so many is held out
_HELD_OUT_SHARE = 20
_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)


class Row(NamedTuple):
    """One training example.

    Attributes:
        ids: token ids, BOS first where the tokenizer has one; at most `seq_len`.
        prompt: how many of them, from the first, are context that no loss is computed on.
    """

    ids: list[int]
    prompt: int = 0


@dataclass(frozen=True)
class DataSource:
    """Where training rows came from, and how many: `tokens` and `rows` of one epoch."""

    name: str
    split: str
    sha256: str
    weight: float
    rows: int
    tokens: int


@dataclass(frozen=True)
class TrainingData:
    """Rows for one epoch.

    Attributes:
        train: columns `input_ids`, `labels`, and `seq_lengths` where rows are packed.
        held_out: the same for rows that never train; None where the text is too short to spare any.
        sources: what was drawn from.
        packed: whether a row may hold several examples.
    """

    train: Dataset
    held_out: Dataset | None
    sources: tuple[DataSource, ...]
    packed: bool

    def record(self) -> list[dict[str, Any]]:
        """The sources, JSON-ready."""
        return [asdict(source) for source in self.sources]


def load_data(
    tokenizer: Any, config: RecoveryConfig, *, seed: int, evaluation: Sequence[str] = ()
) -> TrainingData:
    """Tokenize the sources of `config` and draw one epoch of rows from them.

    Text becomes windows of BOS + `seq_len - 1` text tokens, the same as in calibration. Prompt/completion, Alpaca and
    `messages` columns become one example per row, cut at `seq_len`, the loss on the completion or the whole chat.
    Several sources share `max_tokens` evenly, or by their weights (`books.txt=0.7`); what a short one lacks is taken
    from the others, and everything repeats once all are used up.

    Args:
        config: with `seq_len` set.
        seed: of the choice and the order of rows.
        evaluation: texts that will be evaluated on; training on one of them is refused.

    Raises:
        UsageError: for text that is empty, shorter than one window or evaluated on, a dataset without usable columns,
            `messages` without a chat template.
    """
    if not config.data:
        raise UsageError("no training text was named: pass --data NAME_OR_FILE")
    weighted = [parse_weight(source) for source in config.data]
    opened = [open_source(name, config.split, config.streaming) for name, _ in weighted]
    _refuse_evaluated(opened, evaluation)
    limit = config.max_tokens if config.streaming else None
    pools = [tokenized(tokenizer, source, config.seq_len or 0, limit) for source in opened]
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
    packed = config.packing and any(isinstance(source, Rows) and source.kind != "text" for source in opened)
    return TrainingData(
        _dataset(chosen, config, packed),
        _dataset(held_out, config, packed) if held_out else None,
        tuple(records),
        packed,
    )


def tokenized(tokenizer: Any, source: Text | Rows, seq_len: int, limit: int | None = None) -> list[Row]:
    """All rows of a source, in order; of a stream no more than hold `limit` tokens."""
    if isinstance(source, Text):
        return text_windows(tokenizer, source, seq_len)
    if source.kind == "text":
        return _streamed_windows(tokenizer, source, seq_len, limit)
    rows: list[Row] = []
    tokens, digest = 0, hashlib.sha256()
    for number, example in enumerate(source.examples):
        digest.update(json.dumps(example, sort_keys=True, default=str).encode())
        row = _example(tokenizer, example, source, seq_len, number)
        # an example whose prompt alone fills the row teaches nothing
        if row.prompt < len(row.ids):
            rows.append(row)
            tokens += len(row.ids)
        if limit is not None and tokens >= limit:
            break
    if not rows:
        raise UsageError(f"dataset {source.name} holds no example with text within {seq_len} tokens")
    source.sha256 = digest.hexdigest()
    return rows


def text_windows(tokenizer: Any, text: Text, seq_len: int) -> list[Row]:
    """Disjoint windows of BOS + `seq_len - 1` text tokens (`seq_len` where there is no BOS), in order."""
    return _windows(tokenizer, token_ids(tokenizer, text.content), seq_len, text.name)


def _streamed_windows(tokenizer: Any, source: Rows, seq_len: int, limit: int | None) -> list[Row]:
    ids: list[int] = []
    digest = hashlib.sha256()
    for number, example in enumerate(source.examples):
        if not isinstance(example["text"], str):
            raise not_text(source.name, number, "text", example["text"])
        text = f"{example['text']}\n\n"
        digest.update(text.encode())
        ids += token_ids(tokenizer, text)
        if limit is not None and len(ids) >= limit:
            break
    source.sha256 = digest.hexdigest()
    return _windows(tokenizer, ids, seq_len, source.name)


def _windows(tokenizer: Any, ids: list[int], seq_len: int, name: str) -> list[Row]:
    return [Row(row) for row in cut_windows(tokenizer, ids, seq_len, name).tolist()]


def _example(tokenizer: Any, example: dict[str, Any], source: Rows, seq_len: int, number: int) -> Row:
    kind = source.kind
    for column in EXAMPLE_KINDS[kind]:
        value = example[column]
        # prompt and completion may be chats as well
        if not isinstance(value, str) and not (isinstance(value, list) and kind in ("messages", "completion")):
            raise not_text(source.name, number, column, value)
    if kind == "completion" and type(example["prompt"]) is not type(example["completion"]):
        raise UsageError(f"row {number + 1} of {source.name} mixes a text and a chat in prompt and completion: make both one")
    if kind == "messages":
        return Row(_chat(tokenizer, example["messages"], source)[:seq_len])
    if kind == "alpaca":
        extra = example.get("input") or ""
        prompt: Any = _ALPACA.format(
            paired=", paired with an input that provides further context" if extra else "",
            instruction=example["instruction"],
            input=f"### Input:\n{extra}\n\n" if extra else "",
        )
        completion = example["output"]
    else:
        prompt, completion = example["prompt"], example["completion"]
    if isinstance(prompt, str):
        # tokenized apart, as the prompt will be when the model is used
        start = tokenizer(prompt)["input_ids"]
        if tokenizer.eos_token_id is not None and start and start[-1] == tokenizer.eos_token_id:
            start = start[:-1]
        end = tokenizer(completion, add_special_tokens=False)["input_ids"]
        end += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    else:
        start = _chat(tokenizer, prompt, source, add_generation_prompt=True)
        end = _chat(tokenizer, [*prompt, *completion], source)[len(start) :]
    return Row((start + end)[:seq_len], len(start))


def _chat(tokenizer: Any, messages: list[dict[str, Any]], source: Rows, **options: Any) -> list[int]:
    if not tokenizer.chat_template:
        raise UsageError(
            f"dataset {source.name} holds chats, and the model's tokenizer has no chat template: add one "
            "(chat_template.jinja in the model's folder) or use prompt/completion columns"
        )
    try:
        ids: list[int] = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]
        return ids
    except (TemplateError, TypeError, ValueError) as error:
        raise UsageError(
            f"the chat template of the model's tokenizer does not take a chat of dataset {source.name}: {error}"
        ) from error


def _refuse_evaluated(opened: Iterable[Text | Rows], evaluation: Sequence[str]) -> None:
    evaluated = {text.sha256: text for text in (load_text(name, split="test") for name in evaluation)}
    for source in opened:
        if isinstance(source, Text) and source.sha256 in evaluated:
            raise UsageError(
                f"{source.name} ({source.split}) is what evaluation measures on and never trains: give other text"
            )


def _hold_out(pools: list[list[Row]], config: RecoveryConfig) -> list[Row]:
    """Take the held-out rows, evenly spaced, out of every pool; fewer where the training itself is short."""
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
    """Tokens per source: proportional to weight; what a short source lacks is taken from the others."""
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
    """Rows holding `tokens` tokens (up to the last row), each as often as any other, give or take once."""
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
        "labels": [[IGNORED] * row.prompt + row.ids[row.prompt :] for row in rows],
    }
    dataset = Dataset.from_dict(columns)
    if not packed:
        return dataset
    from trl import pack_dataset

    return pack_dataset(dataset, config.seq_len, "bfd", {"num_proc": None})


#: kind of example -> the columns that make it, in the order they are looked for
EXAMPLE_KINDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}


@dataclass
class Rows:
    """Examples of a dataset.

    Attributes:
        kind: one of `KINDS`; `text` only where the dataset is streamed.
        examples: mappings with at least the columns of `kind`.
        sha256: of the examples read so far; empty before.
    """

    name: str
    split: str
    kind: str
    examples: Iterable[dict[str, Any]]
    sha256: str = ""


def open_source(source: str, split: str, streaming: bool = False) -> Text | Rows:
    """Open a named text, a text file, a `.json`, `.jsonl`, `.csv` or `.parquet` file, or a dataset `PATH[:CONFIG]`.

    Args:
        split: of datasets; named texts and files have only one that trains.
        streaming: do not download a dataset before reading it.

    Raises:
        UsageError: for a source that is not there, a split it does not have, or columns that make no example.
    """
    path = Path(source)
    if source in NAMED or (path.is_file() and path.suffix not in TABLES):
        return load_text(source, split="train")
    if path.suffix in (*TABLES, ".txt", ".md") and not path.is_file():
        raise UsageError(f"no such file: {source}")
    if not (path.exists() or "/" in source):
        raise unknown("text", source, [*NAMED, "a file", "a dataset id ORG/NAME"])
    rows = open_dataset(source, split, streaming)
    columns = list(rows.column_names or next(iter(rows), ()))
    if not columns:
        raise UsageError(f"dataset {source} holds no rows")
    kind = next((kind for kind, needed in EXAMPLE_KINDS.items() if set(needed) <= set(columns)), None)
    if kind is None:
        wanted = "; ".join(" + ".join(needed) for needed in EXAMPLE_KINDS.values())
        raise UsageError(f"dataset {source} has columns {', '.join(columns)}; training needs one of: {wanted}")
    name = Path(source.partition(":")[0]).stem
    if kind == "text" and not streaming:
        texts = rows["text"][:]
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise not_text(source, number, "text", text)
        content = "\n\n".join(texts)
        if not content.strip():
            raise UsageError(f"the text {source} is empty")
        return Text(name, split, content)
    return Rows(name, split, kind, rows)


def not_text(source: str, number: int, column: str, value: Any) -> UsageError:
    """The error for row `number`, counted from 0, that has no text in `column`."""
    return UsageError(f"row {number + 1} of {source} holds {value!r:.60} in column {column!r}, which is not text: drop it")
