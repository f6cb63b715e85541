"""Open training sources and tokenize their examples."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError

from ..data import NAMED, TABLES, Text, cut_windows, load_text, open_dataset, token_ids, token_windows
from ..errors import UsageError, unknown
from ..models import IGNORED

logger = logging.getLogger(__name__)
#: kind of example -> its required columns, in the order in which kinds are tried
EXAMPLE_KINDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)


class Row(NamedTuple):
    """One training example.

    Attributes:
        ids: token ids, BOS first if the tokenizer has one; at most `seq_len`.
        labels: `ids` with `IGNORED` for tokens without a loss; None: every token has one.
    """

    ids: list[int]
    labels: list[int] | None = None


@dataclass
class Examples:
    """Rows of a dataset.

    Attributes:
        kind: a key of `EXAMPLE_KINDS`; `text` only if the dataset is streamed.
        examples: mappings with at least the columns of `kind`.
        sha256: hash of the examples that were tokenized; empty before.
        diverged: whether a prompt was found that is no prefix of its example.
    """

    name: str
    split: str
    kind: str
    examples: Iterable[dict[str, Any]]
    sha256: str = ""
    diverged: bool = False


def open_source(source: str, split: str, streaming: bool = False) -> Text | Examples:
    """Open a named text, a text file, a `.json`, `.jsonl`, `.csv` or `.parquet` file, or a dataset `PATH[:CONFIG]`.

    Args:
        split: split of a dataset; named texts have only `train`, a file has none.
        streaming: read a dataset without downloading it first.

    Raises:
        UsageError: there is no such source or split, or its columns make no example.
    """
    path = Path(source)
    if source in NAMED and split != "train":
        raise UsageError(f"split={split}: {source} trains on its split train only: leave split out, or give a dataset id")
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
                raise _not_text(source, number, "text", text)
        content = "\n\n".join(texts)
        if not content.strip():
            raise UsageError(f"the text {source} is empty")
        return Text(name, split, content)
    return Examples(name, split, kind, rows)


def tokenized(
    tokenizer: Any, source: Text | Examples, seq_len: int, limit: int | None = None, tokens_used: int | None = None
) -> list[Row]:
    """Return the rows of a source in order; for a stream, only as many as it takes to reach `limit` tokens.

    Of a very long text, of which `tokens_used` will be trained on, only parts are tokenized: see `token_windows`.
    """
    if isinstance(source, Text):
        # twice as many as are used, so that the held-out ones can be spared
        wanted = len(source.content) if tokens_used is None else 2 * tokens_used // seq_len + 1
        return [Row(row) for row in token_windows(tokenizer, source, seq_len, wanted).tolist()]
    if source.kind == "text":
        return _streamed_windows(tokenizer, source, seq_len, limit)
    template = _marking_template(tokenizer, source) if source.kind == "messages" else None
    rows: list[Row] = []
    tokens, digest = 0, hashlib.sha256()
    for number, example in enumerate(source.examples):
        digest.update(json.dumps(example, sort_keys=True, default=str).encode())
        _check_columns(example, source, number)
        if source.kind == "messages":
            ids, labels = _chat_row(tokenizer, example["messages"], source, template)
        else:
            ids, labels = _completion_row(tokenizer, example, source)
        ids, labels = ids[:seq_len], labels[:seq_len]
        # no loss: the prompt alone fills the row, or the chat has no turn of the assistant
        if any(label != IGNORED for label in labels):
            rows.append(Row(ids, labels))
            tokens += len(ids)
        if limit is not None and tokens >= limit:
            break
    if not rows:
        raise UsageError(f"dataset {source.name} holds no example with text to train on within {seq_len} tokens")
    source.sha256 = digest.hexdigest()
    return rows


def _streamed_windows(tokenizer: Any, source: Examples, seq_len: int, limit: int | None) -> list[Row]:
    ids: list[int] = []
    digest = hashlib.sha256()
    for number, example in enumerate(source.examples):
        _check_columns(example, source, number)
        text = f"{example['text']}\n\n"
        digest.update(text.encode())
        ids += token_ids(tokenizer, text)
        if limit is not None and len(ids) >= limit:
            break
    source.sha256 = digest.hexdigest()
    return _windows(tokenizer, ids, seq_len, source.name)


def _windows(tokenizer: Any, ids: list[int], seq_len: int, name: str) -> list[Row]:
    return [Row(row) for row in cut_windows(tokenizer, ids, seq_len, name).tolist()]


def _check_columns(example: dict[str, Any], source: Examples, number: int) -> None:
    """Raise [`UsageError`] for an example whose columns hold no text (or chat, where one is allowed)."""
    for column in EXAMPLE_KINDS[source.kind]:
        value = example[column]
        # prompt and completion may be chats as well
        if not isinstance(value, str) and not (isinstance(value, list) and source.kind in ("messages", "completion")):
            raise _not_text(source.name, number, column, value)
    if source.kind == "completion" and type(example["prompt"]) is not type(example["completion"]):
        raise UsageError(
            f"row {number + 1} of {source.name} mixes a text and a chat in prompt and completion: make both text or both chat"
        )


def _completion_row(tokenizer: Any, example: dict[str, Any], source: Examples) -> tuple[list[int], list[int]]:
    """Tokenize prompt and completion as trl does: labels start where the prompt alone and the whole example diverge."""
    from trl.data_utils import common_prefix_length

    if source.kind == "alpaca":
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
        eos = tokenizer.eos_token_id
        start, ids = tokenizer(prompt)["input_ids"], tokenizer(prompt + completion)["input_ids"]
        if eos is not None:
            # some tokenizers end every text with EOS
            start = start[:-1] if start[-1:] == [eos] else start
            ids = ids if ids[-1:] == [eos] else [*ids, eos]
    else:
        start = _chat(tokenizer, prompt, source, add_generation_prompt=True)["input_ids"]
        ids = _chat(tokenizer, [*prompt, *completion], source)["input_ids"]
    shared = common_prefix_length(start, ids)
    if shared < len(start) and not source.diverged:
        source.diverged = True
        logger.warning(
            "%s: the prompt alone ends in %r, which the prompt with its completion does not contain; the loss starts where "
            "they diverge. The chat template renders them differently, or tokens merge across the boundary: the model "
            "trains on another context than it sees when it generates",
            source.name,
            tokenizer.decode(start[shared:]),
        )
    return ids, [IGNORED] * shared + ids[shared:]


def _chat_row(
    tokenizer: Any, messages: list[dict[str, Any]], source: Examples, template: str | None
) -> tuple[list[int], list[int]]:
    """Tokenize a chat, with labels on the assistant's turns."""
    chat = _chat(tokenizer, messages, source, chat_template=template, return_assistant_tokens_mask=True)
    pairs = zip(chat["input_ids"], chat["assistant_masks"], strict=True)
    return chat["input_ids"], [token if marked else IGNORED for token, marked in pairs]


def _marking_template(tokenizer: Any, source: Examples) -> str | None:
    """Return a chat template that marks the assistant's turns, None if the tokenizer's own does."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    _check_template(tokenizer, source)
    own = tokenizer.chat_template
    if has_generation_markers(own["default"] if isinstance(own, dict) else own):
        return None
    try:
        template: str | None = get_training_chat_template(tokenizer)
        return template
    except ValueError as error:
        raise UsageError(
            f"dataset {source.name} holds messages, and the model's chat template does not mark the assistant's turns, the "
            "only ones with a loss: put {% generation %} and {% endgeneration %} around them in chat_template.jinja, or use "
            "prompt and completion columns"
        ) from error


def _check_template(tokenizer: Any, source: Examples) -> None:
    if not tokenizer.chat_template:
        raise UsageError(
            f"dataset {source.name} holds chats, and the model's tokenizer has no chat template: add one "
            "(chat_template.jinja in the model's folder) or use prompt and completion columns with text"
        )


def _chat(tokenizer: Any, messages: list[dict[str, Any]], source: Examples, **options: Any) -> Any:
    _check_template(tokenizer, source)
    try:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    except (TemplateError, TypeError, ValueError) as error:
        raise UsageError(
            f"the chat template of the model's tokenizer does not accept a chat of dataset {source.name}: {error}"
        ) from error


def _not_text(source: str, number: int, column: str, value: Any) -> UsageError:
    """Return the error for row `number`, counted from 0, whose `column` holds no text."""
    where = f"row {number + 1} of {source}"
    return UsageError(f"{where} holds {value!r:.60} in column {column!r}, which is not text: remove the row")
