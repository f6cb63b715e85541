"""Load text from names, files and datasets, with a name and a hash for the record."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import UsageError, first_line, unknown
from .demo import demo_text


def text_paths(sources: Iterable[str]) -> list[str]:
    """Drop weights and configurations: `books.txt=0.7` -> `books.txt`, `folder:config` -> `folder`; keep other names."""
    names = [parse_weight(source)[0] for source in sources]
    return [name if Path(name).exists() else name.partition(":")[0] for name in names]


#: repository and configuration of `wikitext2`
WIKITEXT2 = ("Salesforce/wikitext", "wikitext-2-raw-v1")
#: `ptb`: the Hub's own conversion, because `datasets` no longer runs the script that this repository consists of
PTB = "hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank/{split}/0000.parquet"
SPLITS = ("train", "test")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
#: files that hold a table, by ending, and the builder of `datasets` that reads them
TABLES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
#: what ends like this is meant as a file, never as a dataset id
_FILE_ENDINGS = (".txt", ".md", ".text", *TABLES)


@dataclass(frozen=True)
class Text:
    """One text.

    Attributes:
        name: short name or id of the dataset, or name of the folder or file (without ending).
        split: `train`, `test`, or `file` for a plain file, which is its own split.
        content: the text itself.
    """

    name: str
    split: str
    content: str

    @cached_property
    def sha256(self) -> str:
        """Hash of the content (UTF-8), as hex."""
        return hashlib.sha256(self.content.encode("utf-8")).hexdigest()


def load_text(source: str, *, split: str, max_chars: int | None = None) -> Text:
    """Load a text.

    Args:
        source: one of
            - `wikitext2` (`Salesforce/wikitext`, `wikitext-2-raw-v1`): its lines joined by a blank line, as GPTQ and
              the transformers documentation do,
            - `ptb` (Penn Treebank, word level): its sentences joined by a blank line, as GPTQ and LLM-Pruner do,
            - `demo`: stories that come with the package,
            - a text file (UTF-8), taken as it is,
            - a `.json`, `.jsonl`, `.csv` or `.parquet` file, a dataset id `ORG/NAME[:CONFIG]`, or a dataset folder, also
              one written by `save_to_disk`: its column `text`, rows joined by a blank line.
        split: `train` (calibration, recovery) or `test` (evaluation); a file is its own split, `file`.
        max_chars: keep only the first so many characters.

    Raises:
        UsageError: for a name that is neither known nor a file, a text that is empty, a dataset without a column
            `text` or without that split, or one that cannot be reached.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if max_chars is not None and max_chars < 1:
        raise UsageError(f"max_chars={max_chars} must be at least 1")
    path = Path(source)
    folder, _, config = (source, "", "") if path.is_dir() else source.partition(":")
    if source in NAMED:
        text = Text(source, split, NAMED[source](split))
    elif path.is_file():
        text = Text(path.stem, "file", _file(path))
    elif source and Path(folder).is_dir():
        # the folder's own name: a report says which text it was, not where somebody kept it
        text = Text(Path(folder).resolve().name, split, _join(_column(folder, split, source, name=config or None)))
    elif _HUB_ID.fullmatch(folder) and not source.endswith(_FILE_ENDINGS):
        text = Text(source, split, _join(_column(folder, split, source, name=config or None)))
    elif "/" in source or source.endswith(_FILE_ENDINGS):
        raise UsageError(f"no such file or folder: {source}")
    else:
        raise unknown("text", source, [*NAMED, "a text file", "a dataset ORG/NAME[:CONFIG]"])
    if max_chars is not None:
        text = replace(text, content=text.content[:max_chars])
    if not text.content.strip():
        raise UsageError(f"the text {source} is empty")
    return text


def _wikitext2(split: str) -> str:
    path, config = WIKITEXT2
    return _join(_column(path, split, "wikitext2", name=config))


def _ptb(split: str) -> str:
    files = {split: PTB.format(split=split)}
    return _join(_column("parquet", split, "ptb", column="sentence", data_files=files))


def _demo(split: str) -> str:
    return demo_text(split)


#: texts known by name; `split` in, text out
NAMED: dict[str, Callable[[str], str]] = {"wikitext2": _wikitext2, "ptb": _ptb, "demo": _demo}


def _file(path: Path) -> str:
    if path.suffix in TABLES:
        return _join(_column(TABLES[path.suffix], "file", str(path), data_files={"file": str(path)}))
    try:
        # bytes, because text mode would change line ends and with them the hash
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def _join(rows: list[str]) -> str:
    return "\n\n".join(rows)


def _column(path: str, split: str, source: str, *, column: str = "text", **options: Any) -> list[str]:
    """Load a text column of a dataset; raises [`UsageError`] with what the user can do."""
    import datasets
    from httpx2 import HTTPError

    try:
        if _is_saved(Path(path)):
            rows = datasets.load_from_disk(path)
        else:
            rows = datasets.load_dataset(path, split=split, **options)
    except (OSError, ValueError, HTTPError, datasets.exceptions.DatasetsError) as error:
        reason = first_line(error).rstrip(".")
        if split == "file":
            raise UsageError(f"cannot read {source}: {reason}") from error
        flag = "--data FILE" if split == "test" else "--calibration FILE, to recover --data FILE"
        raise UsageError(
            f"cannot load split {split!r} of {source}: {reason}; a text file can be given instead: {flag}"
        ) from error
    if isinstance(rows, dict):
        if split not in rows:
            raise UsageError(f"{source} has no split {split!r}; it has: {', '.join(rows)}")
        rows = rows[split]
    if column not in rows.column_names:
        raise UsageError(f"{source} has no column {column!r}; it has: {', '.join(rows.column_names)}")
    texts: list[str] = rows[column][:]
    if not all(isinstance(text, str) for text in texts):
        raise UsageError(f"column {column!r} of {source} does not hold text: {rows.features[column]}")
    return texts


def _is_saved(folder: Path) -> bool:
    """Return whether `save_to_disk` of `datasets` wrote the folder, which `load_dataset` does not read."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def parse_weight(source: str) -> tuple[str, float]:
    """Split `"books.txt=0.7"` into `("books.txt", 0.7)`; without a weight, or for a path that exists, the weight is 1.0."""
    name, sep, weight = source.rpartition("=")
    if not sep or Path(source).exists():
        return source, 1.0
    try:
        value = float(weight)
    except ValueError:
        return source, 1.0
    if not 0 < value < float("inf"):
        raise UsageError(f"weight {weight} of {name} must be positive and finite")
    return name, value


def open_dataset(source: str, split: str, streaming: bool) -> Any:
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
        raise UsageError(f"cannot load split {split!r} of {source}: {first_line(error)}") from error
    except (OSError, HfHubHTTPError) as error:
        raise UsageError(f"cannot reach dataset {source} ({first_line(error)}): give a file instead") from error


def _saved(dataset: Any, source: str, split: str) -> Any:
    if not isinstance(dataset, dict):
        # a single split remembers which one it was
        if (dataset.split or split) != split:
            raise UsageError(f"dataset {source} is split '{dataset.split}', not {split!r}: give the folder of another split")
        return dataset
    if split not in dataset:
        raise UsageError(f"dataset {source} has no split {split!r}; it has: {', '.join(dataset)}")
    return dataset[split]
