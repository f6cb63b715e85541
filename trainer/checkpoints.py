"""Seal training checkpoints with a manifest and find the latest complete one.

The manifest is written last and checked before training is resumed, so that a partly written checkpoint is skipped.
"""

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
    """Write the manifest of a finished checkpoint: every file with its size in bytes."""
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in _files(checkpoint)}
    write_json(checkpoint / MANIFEST, dict(sorted(sizes.items())))


def is_complete(checkpoint: Path) -> bool:
    """Return whether every file of the manifest exists with its full size."""
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    found = {str(path.relative_to(checkpoint)): path.stat().st_size for path in _files(checkpoint)}
    return isinstance(sizes, dict) and all(found.get(name) == size for name, size in sizes.items())


def latest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in `folder`, None without one; warn about each one that is skipped."""
    for checkpoint in _newest_first(folder):
        if is_complete(checkpoint):
            return checkpoint
        logger.warning("%s is incomplete, skipping it", checkpoint)
    return None


def remove_incomplete(folder: Path) -> None:
    """Delete partly written checkpoints, which would otherwise count towards the number to keep."""
    for checkpoint in _newest_first(folder):
        if not is_complete(checkpoint):
            shutil.rmtree(checkpoint)


def free_space(folder: Path) -> str:
    """Describe the free space on the disk of `folder`: some writers fail without saying that the disk is full."""
    return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB free on the disk"


def _newest_first(folder: Path) -> list[Path]:
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _files(checkpoint: Path) -> list[Path]:
    return [path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST]
