"""Files that are whole or absent: everything is written under a temporary name and renamed when complete."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError, WorkError

if TYPE_CHECKING:
    import torch


def refuse_existing(path: str | os.PathLike[str], overwrite: bool, flag: str = "--overwrite") -> Path:
    """Return `path`; raise [`UsageError`] where it exists (an empty folder counts as absent) and `overwrite` is false."""
    target = Path(path)
    occupied = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    if occupied and not overwrite:
        raise UsageError(f"{target} exists already: choose another output or pass {flag}")
    return target


@contextmanager
def new_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it takes the name `path` when the block ends without an error.

    On an error the temporary folder is removed and `path` stays as it was. Raises [`UsageError`] as `refuse_existing`.
    """
    target = refuse_existing(path, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield scratch
        scratch.chmod(0o777 & ~_umask())
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.rename(target, old / target.name)
            os.rename(scratch, target)
            shutil.rmtree(old)
        else:
            os.rename(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` (UTF-8) to `path` in one step: readers see the old file or the new one, never half of it."""
    target = Path(path)
    handle, scratch = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent or ".")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(scratch, 0o666 & ~_umask())
        os.replace(scratch, target)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike[str], data: Any) -> None:
    """`write_text` of `data` as indented JSON with a final newline; keys keep their order."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def check_room(folder: Path, size: int, what: str) -> None:
    """Raise [`UsageError`] unless `folder`, with what it holds already, has room on its disk for `size` bytes of `what`."""
    there = sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
    place = next(path for path in folder.absolute().parents if path.exists())
    missing, free = size - there, shutil.disk_usage(place).free
    if missing > free:
        raise UsageError(
            f"{what} need {missing / 1e9:.2f} GB more, and {place} has {free / 1e9:.2f} GB left: "
            "make room, or choose another output"
        )


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file; [`WorkError`], naming `path`, where it cannot be written, on a full disk for one."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path)
    except (OSError, SafetensorError) as error:
        raise WorkError(f"cannot write {path}: {' '.join(str(error).split())}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
