"""Keep the progress of an interrupted call, and decide whether the next one may resume it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UsageError, WorkError, on_one_line
from .files import exclusive_lock

PROGRESS = "progress.json"
#: in a working folder: where the output is assembled before it is renamed
ASSEMBLY = "whole"
VERSION = 1


def working_folder(target: Path) -> Path:
    """Return the folder for the parts of an unfinished `target`."""
    return target.parent / f".{target.name}.unfinished"


@contextmanager
def resume_or_start(
    working: Path, resume: bool, overwrite: bool, inputs: dict[str, str], notes: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Lock `working` until the block ends, and yield the progress that an interrupted call saved there.

    That is `version`, `inputs` and a dictionary for each of `notes`, empty without such a call. The block saves it as
    `PROGRESS` once there is something to keep; without that file, a failing block removes the folder.

    Raises:
        UsageError: an interrupted call is not to be resumed or had other `inputs`; or another process is at work.
        WorkError: the folder cannot be created.
    """
    with exclusive_lock(working):
        _refuse(working, resume, overwrite)
        if not (resume and (working / PROGRESS).exists()):
            # without its progress a folder is what is left of one that was being removed
            remove_working_folder(working)
        try:
            working.mkdir(exist_ok=True)
        except OSError as error:
            raise WorkError(f"cannot write {working}: {error.strerror}") from error
        try:
            yield _noted(working, inputs, notes)
        except BaseException:
            if not (working / PROGRESS).exists():
                remove_working_folder(working)
            raise


@contextmanager
def resumable(working: Path) -> Iterator[None]:
    """Add to errors of the block, raised as [`WorkError`], that finished parts are in `working` for --resume."""
    try:
        yield
    except (OSError, WorkError) as error:
        reason = on_one_line(error)
        raise WorkError(f"{reason}; what was finished is in {working}: pass --resume to go on, or delete it") from error


def _noted(working: Path, inputs: dict[str, str], notes: Sequence[str]) -> dict[str, Any]:
    """Read the saved progress, or start with an empty one."""
    path = working / PROGRESS
    if not path.exists():
        return {"version": VERSION, "inputs": inputs, **{name: {} for name in notes}}
    try:
        noted: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        inputs_before = noted["inputs"] if noted["version"] == VERSION else {}
        for name in notes:
            noted[name].items()
        differing = [name for name, value in inputs.items() if inputs_before.get(name) != value]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is not readable, so nothing can be resumed: delete {working}") from error
    if differing:
        raise UsageError(f"{working} was begun with another {differing[0]}: give the same one, or delete it to begin anew")
    return noted


def assembly_folder(working: Path) -> Path:
    """Create an empty folder in `working` for the output; files that an interrupted call had moved there are moved back."""
    whole = working / ASSEMBLY
    if whole.is_dir():
        for path in whole.glob("*.safetensors"):
            os.rename(path, working / path.name)
        shutil.rmtree(whole)
    whole.mkdir(parents=True)
    return whole


def remove_working_folder(working: Path) -> None:
    """Remove a working folder, if it exists; renamed first, so that a half-removed one is never resumed."""
    going = working.with_name(f"{working.name}.dropped")
    shutil.rmtree(going, ignore_errors=True)
    if working.exists():
        os.rename(working, going)
        shutil.rmtree(going)


def refuse_unfinished(working: Path, resume: bool, overwrite: bool) -> None:
    """Raise [`UsageError`] if `working` is in use, or was left by a call that is neither resumed nor overwritten."""
    if working.exists():
        with exclusive_lock(working):
            _refuse(working, resume, overwrite)


def _refuse(working: Path, resume: bool, overwrite: bool) -> None:
    if (working / PROGRESS).exists() and not (resume or overwrite):
        raise UsageError(f"{working} is of an interrupted call: pass --resume to go on with it, or delete it")


def sha256(value: Any) -> str:
    """Hash the `repr` of a value: hex."""
    return hashlib.sha256(repr(value).encode()).hexdigest()
