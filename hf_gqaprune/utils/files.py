"""Write files and folders under a temporary name and rename them when complete."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from ..errors import UsageError, WorkError, on_one_line

if TYPE_CHECKING:
    import torch

#: a file of each folder that may be replaced, and a key in it: checkpoint, adapter, statistics, run
_HEADS = {"config.json": "model_type", "adapter_config.json": "peft_type", "statistics.json": "criterion", "run.json": "done"}
#: keys of the JSON files that may be replaced: plan, report
_JSON_KEYS = ({"source", "layers"}, {"model", "stages"})
#: how the other files that may be replaced begin: GGUF, PNG, Modelfile, card, and a line that every recipe has
_BEGINNINGS, _RECIPE = (b"GGUF", b"\x89PNG", b"FROM ", b"---\n"), b"\nprune:"
#: no plan or report is larger
_LARGEST = 1 << 27


def refuse_existing(
    path: str | os.PathLike[str],
    overwrite: bool,
    *,
    file: bool = False,
    hint: str = "choose another output or pass --overwrite",
) -> Path:
    """Return `path` if a folder, or with `file` a file, may be written there.

    Raises:
        UsageError: it exists (an empty folder counts as absent) and `overwrite` is false; it is of another kind than what
            would replace it; it cannot be made, or not be replaced by a rename, as a link, a mounted disk or a folder in
            which this process stands.
    """
    target = Path(path)
    if target.name == "..":
        raise UsageError(f"{target} ends in ..: write out which folder is meant, {target.resolve()}")
    if target.is_symlink() and not file:
        raise UsageError(f"{target} is a link, which a folder cannot replace: name {target.resolve()}")
    taken = is_occupied(target)
    if taken and not overwrite:
        raise UsageError(f"{target} exists already: {hint}")
    if file and target.is_dir():
        raise UsageError(f"{target} is a folder: name a file")
    if target.exists() and (os.path.ismount(target) or Path.cwd().is_relative_to(target.resolve())):
        raise UsageError(f"{target} is a mounted disk or holds the current folder, and stays: name a folder in it")
    if taken and not file and not any(key in _head(target / name) for name, key in _HEADS.items()):
        raise UsageError(
            f"{target} is no checkpoint, adapter, statistics or run, so it is not replaced: choose another output, or "
            "delete it yourself"
        )
    if taken and file and not _is_replaceable(target):
        raise UsageError(
            f"{target} is no plan, report, recipe, card or GGUF file, so it is not replaced: choose another output, or delete "
            "it yourself"
        )
    place = next(parent for parent in target.absolute().parents if parent.exists())
    if not place.is_dir():
        raise UsageError(f"{target} cannot be written: {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"{target} cannot be written: no permission to write in {place}")
    return target


def is_occupied(path: Path) -> bool:
    """Return whether `path` exists; an empty folder counts as absent."""
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def _is_replaceable(path: Path) -> bool:
    """Tell by its content whether a file is of a kind that this package writes; an empty file is."""
    with path.open("rb") as file:
        beginning = file.read(1 << 16)
    if not beginning or beginning.startswith(_BEGINNINGS) or _RECIPE in beginning:
        return True
    small = path.stat().st_size <= _LARGEST and beginning.lstrip().startswith(b"{")
    return small and any(keys <= _head(path).keys() for keys in _JSON_KEYS)


def _head(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def refuse_overwriting_inputs(target: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Raise [`UsageError`] if one of `inputs`, files or folders that will be read, is `target` or inside it."""
    replaced = Path(target).resolve()
    for path in inputs:
        if Path(path).exists() and (found := Path(path).resolve()).is_relative_to(replaced):
            where = "" if found == replaced else f" is inside {target} and"
            raise UsageError(f"{path}{where} would be replaced by the output: choose another output")


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Hold the only lock on `folder`, which need not exist, until the block or the process ends.

    The lock is on a file beside it, so that the folder itself may be replaced meanwhile.

    Raises:
        UsageError: another process holds the lock.
        WorkError: the lock file cannot be written.
    """
    path = folder.with_name(f".{folder.name.removeprefix('.')}.lock")
    taken = FileLock(path)
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        taken.acquire(blocking=False)
        # the one before may have removed it in between
        while not path.exists():
            taken.release()
            taken.acquire(blocking=False)
    except Timeout:
        raise UsageError(f"another process works in {folder}: wait until it has ended") from None
    except OSError as error:
        raise WorkError(f"cannot lock {path}: {error.strerror}") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        taken.release()


@contextmanager
def new_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it takes the name `path` when the block ends without an error.

    On an error the temporary folder is removed and `path` stays as it was; what a killed process left is removed by the next
    call. Raises [`UsageError`] as `refuse_existing` and `exclusive_lock`.
    """
    target = refuse_existing(path, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.partial")
    with exclusive_lock(scratch):
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            yield scratch
            # another may have come by now
            refuse_existing(target, overwrite)
            replace_folder(scratch, target)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise


def replace_folder(folder: Path, target: Path) -> None:
    """Rename `folder` to `target` on the same disk; an old `target` is removed, or restored on an error."""
    old = target.with_name(f".{target.name}.replaced")
    if old.exists() and not target.exists():
        # a process was killed between the two renames below
        os.rename(old, target)
    if not target.exists():
        os.rename(folder, target)
        return
    shutil.rmtree(old, ignore_errors=True)
    os.rename(target, old)
    try:
        os.rename(folder, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old)


@contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary file beside `path`; it replaces `path` when the block ends without an error, else it is removed."""
    target = Path(path)
    scratch = _scratch(target)
    try:
        yield scratch
        os.replace(scratch, target)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` (UTF-8) to `path` in one step: readers see the old file or the new one, never half of it."""
    with new_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], data: Any) -> None:
    """Write `data` as indented JSON with a final newline, by `write_text`; keys keep their order."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def check_disk_space(folder: Path, size: int, what: str) -> None:
    """Raise [`UsageError`] unless the disk has room for `size` bytes of `what` in `folder`, less what it already holds."""
    there = size_on_disk(folder)
    place = next(path for path in folder.absolute().parents if path.exists())
    missing, free = size - there, shutil.disk_usage(place).free
    if missing > free:
        raise UsageError(
            f"{what} need {missing / 1e9:.2f} GB more, and {place} has {free / 1e9:.2f} GB left: "
            "make room, or choose another output"
        )


def filesystem_of(path: Path) -> int:
    """Return the id of the filesystem that `path`, which need not exist, is or would be on."""
    return next(place for place in path.absolute().parents if place.exists()).stat().st_dev


def size_on_disk(folder: Path) -> int:
    """Return the bytes that the files below `folder` take; 0 if it does not exist."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; raises [`WorkError`], naming `path`, if that fails, such as on a full disk."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata)
    except (OSError, SafetensorError) as error:
        raise WorkError(f"cannot write {path}: {on_one_line(error)}") from error


def _scratch(target: Path) -> Path:
    """Choose a hidden unused name beside `target`; unlike a file of `tempfile`, it gets the usual permissions."""
    return target.with_name(f".{secrets.token_hex(8)}.{target.name}")
