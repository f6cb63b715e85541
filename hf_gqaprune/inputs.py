"""Sources of text go in; the files and folders that they name come out, so that no output replaces what is read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .calibration import parse_weight


def text_paths(sources: Iterable[str]) -> list[str]:
    """`books.txt=0.7` -> `books.txt`, `folder:config` -> `folder`; names that are no path stay as they are."""
    names = [parse_weight(source)[0] for source in sources]
    return [name if Path(name).exists() else name.partition(":")[0] for name in names]
