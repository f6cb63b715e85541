"""Start a recovery in processes of `accelerate launch`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ..configuration import RecoveryConfig, builtin
from ..errors import UsageError, WorkError, unknown
from ..utils import write_text
from . import checkpoints
from .request import REQUEST_FILE, check_output, make_request


def launch(
    model: str | os.PathLike[str],
    data: Sequence[str] | RecoveryConfig,
    output: str | os.PathLike[str],
    *,
    accelerate: Sequence[str] = (),
    **arguments: Any,
) -> Path:
    """Run [`recover`], whose arguments these are, in processes started by `accelerate launch`.

    Args:
        accelerate: flags for `accelerate launch`; among them `--accelerate_config NAME` takes one of the packaged
            configurations (`single`, `multi_gpu`, `fsdp2`, `zero3`, `cpu_2`) or a file. Without it the number of
            processes and GPUs decides.

    Raises:
        UsageError, WorkError: as `recover`; also WorkError where a process dies.
    """
    request = make_request(model, data, output, **arguments)
    check_output(request)
    with tempfile.TemporaryDirectory(prefix="gqaprune_") as scratch:
        config, failure = Path(scratch) / REQUEST_FILE, Path(scratch) / "failure.json"
        write_text(config, yaml.safe_dump(request.to_dict(), sort_keys=False))
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch", *accelerate_flags(accelerate)),
            *("-m", "hf_gqaprune.trainer.recovery", "--config", str(config), "--failure", str(failure)),
        ]
        code = _wait_for(command)
        if failure.exists():
            told = json.loads(failure.read_text(encoding="utf-8"))
            if told["traceback"]:
                raise WorkError(f"{told['message']} (--debug shows where)") from RuntimeError(told["traceback"])
            raise {"UsageError": UsageError}.get(told["kind"], WorkError)(told["message"])
    if code:
        kept = checkpoints.latest(request.work)
        raise WorkError(
            f"training stopped with exit code {code}" + (f"; {kept} is kept: go on with --resume" if kept else "")
        )
    return Path(output)


def _wait_for(command: Sequence[str]) -> int:
    """The exit code of `command`. Where this process is interrupted or terminated, so is all that the command started."""
    import psutil

    def stop(number: int, _frame: Any) -> NoReturn:
        raise SystemExit(128 + number)

    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if main_thread else None
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except BaseException:
        started = psutil.Process(process.pid)
        for child in [*started.children(recursive=True), started]:
            with contextlib.suppress(psutil.NoSuchProcess):  # ended by itself
                child.terminate()
        process.wait()
        raise
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, before)


def accelerate_flags(flags: Sequence[str]) -> list[str]:
    """Flags for `accelerate launch` with `--accelerate_config NAME` turned into `--config_file PATH`."""
    import torch

    given = list(flags)
    if "--config_file" in given:
        return given
    if "--accelerate_config" in given:
        at = given.index("--accelerate_config")
        if at + 1 == len(given):
            raise UsageError(f"--accelerate_config needs a file or one of {', '.join(builtin('accelerate'))}")
        name = given[at + 1]
        del given[at : at + 2]
    else:
        gpus = torch.cuda.device_count()
        several = _processes(given, default=max(1, gpus)) > 1
        name = ("multi_gpu" if gpus else "cpu_2") if several else "single"
        if several and gpus and not any(flag.startswith("--num_processes") for flag in given):
            given += ["--num_processes", str(gpus)]
    path = builtin("accelerate").get(name, Path(name))
    if not path.is_file():
        raise unknown("accelerate configuration", name, builtin("accelerate"))
    _check_flags(given)
    return ["--config_file", str(path), *given]


def _check_flags(flags: Sequence[str]) -> None:
    """Refuse what `accelerate launch` would refuse, in one line."""
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()

    def refuse(message: str) -> NoReturn:
        raise UsageError(f"{message} (see `gqaprune recover --help` and `accelerate launch --help`)")

    parser.error = refuse
    parser.parse_args([*flags, "script"])


def _processes(flags: Sequence[str], default: int) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--num_processes", "--num-processes", type=int, default=default)
    try:
        return int(parser.parse_known_args(list(flags))[0].num_processes)
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from error
