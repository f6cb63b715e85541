"""A source's name goes in; a `Text`, or the rows of a dataset with examples, comes out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError, unknown
from ..text import NAMED, TABLES, Text, load_text

#: kind of example -> the columns that make it, in the order they are looked for
KINDS: dict[str, tuple[str, ...]] = {
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
    rows = _open_dataset(source, split, streaming)
    columns = list(rows.column_names or next(iter(rows), ()))
    if not columns:
        raise UsageError(f"dataset {source} holds no rows")
    kind = next((kind for kind, needed in KINDS.items() if set(needed) <= set(columns)), None)
    if kind is None:
        wanted = "; ".join(" + ".join(needed) for needed in KINDS.values())
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


def _open_dataset(source: str, split: str, streaming: bool) -> Any:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    path = Path(source)
    try:
        if path.is_file():
            builder = TABLES[path.suffix]
            return datasets.load_dataset(builder, data_files={"train": source}, split=split, streaming=streaming)
        if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
            return _saved(datasets.load_from_disk(source), source, split)
        name, _, config = source.partition(":")
        return datasets.load_dataset(name, config or None, split=split, streaming=streaming)
    except StopIteration as error:
        # datasets finds no first line to guess the columns from
        raise UsageError(f"dataset {source} holds no rows") from error
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise UsageError(f"cannot load split {split!r} of {source}: {_first_line(error)}") from error
    except (OSError, HfHubHTTPError) as error:
        raise UsageError(f"cannot reach dataset {source} ({_first_line(error)}): give a file instead") from error


def _saved(dataset: Any, source: str, split: str) -> Any:
    if not isinstance(dataset, dict):
        # a single split remembers which one it was
        if (dataset.split or split) != split:
            raise UsageError(f"dataset {source} is split '{dataset.split}', not {split!r}: give the folder of another split")
        return dataset
    if split not in dataset:
        raise UsageError(f"dataset {source} has no split {split!r}; it has: {', '.join(dataset)}")
    return dataset[split]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
