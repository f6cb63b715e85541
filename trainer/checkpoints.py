"""Training checkpoints that are whole or skipped: a manifest is written last, and checked before a resume."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

from ..utils import write_json

logger = logging.getLogger(__name__)
MANIFEST = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def seal(checkpoint: Path) -> None:
    """Write the manifest of a finished checkpoint: every file and its size."""
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in _files(checkpoint)}
    write_json(checkpoint / MANIFEST, dict(sorted(sizes.items())))


def is_whole(checkpoint: Path) -> bool:
    """Whether every file of the manifest is there in its full size."""
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    found = {str(path.relative_to(checkpoint)): path.stat().st_size for path in _files(checkpoint)}
    return isinstance(sizes, dict) and all(found.get(name) == size for name, size in sizes.items())


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`, None where there is none; each one skipped is warned of."""
    for checkpoint in _newest_first(folder):
        if is_whole(checkpoint):
            return checkpoint
        logger.warning("%s is incomplete and is skipped", checkpoint)
    return None


def remove_incomplete(folder: Path) -> None:
    """Delete half-written checkpoints, which would otherwise count among those to keep."""
    for checkpoint in _newest_first(folder):
        if not is_whole(checkpoint):
            shutil.rmtree(checkpoint)


def free_space(folder: Path) -> str:
    """What is left on the disk of `folder`: some writers fail without saying that it is full."""
    return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB of the disk are free"


def _newest_first(folder: Path) -> list[Path]:
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _files(checkpoint: Path) -> list[Path]:
    return [path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST]
