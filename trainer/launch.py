"""Launch a recovery in processes of `accelerate launch`."""

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
    data: Sequence[str] | RecoveryConfig | None,
    output: str | os.PathLike[str],
    *,
    accelerate: Sequence[str] = (),
    **arguments: Any,
) -> Path:
    """Run [`recover`], which takes the same arguments, in processes of `accelerate launch`.

    Args:
        accelerate: flags for `accelerate launch`. `--accelerate_config NAME_OR_FILE` takes a packaged configuration
            (`single`, `multi_gpu`, `fsdp2`, `zero3`, `cpu_2`) or a file; without it the number of processes and GPUs
            decides.

    Raises:
        UsageError, WorkError: as `recover`; also WorkError if a process dies.
    """
    request = make_request(model, data, output, **arguments)
    check_output(request)
    with tempfile.TemporaryDirectory(prefix="gqaprune_") as scratch:
        config, failure = Path(scratch) / REQUEST_FILE, Path(scratch) / "failure.json"
        write_text(config, yaml.safe_dump(request.to_dict(), sort_keys=False))
        flags = accelerate_flags(accelerate)
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch", *flags, *thread_flags(flags, request.config.threads)),
            *("-m", "hf_gqaprune.trainer.recovery", "--config", str(config), "--failure", str(failure)),
        ]
        code = _wait_for(command)
        if failure.exists():
            report = json.loads(failure.read_text(encoding="utf-8"))
            if report["traceback"]:
                raise WorkError(f"{report['message']} (--debug shows where)") from RuntimeError(report["traceback"])
            raise {"UsageError": UsageError}.get(report["kind"], WorkError)(report["message"])
    if code:
        kept = checkpoints.latest(request.work)
        raise WorkError(
            f"training stopped with exit code {code}" + (f"; {kept} is kept: pass --resume to continue" if kept else "")
        )
    return Path(output)


def _wait_for(command: Sequence[str]) -> int:
    """Return the exit code of `command`; if this process is interrupted or terminated, so is all that `command` started."""
    import psutil

    def stop(number: int, _frame: Any) -> NoReturn:
        raise SystemExit(128 + number)

    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if main_thread else None
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except BaseException:
        parent = psutil.Process(process.pid)
        for child in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.NoSuchProcess):  # has ended by itself
                child.terminate()
        process.wait()
        raise
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, before)


def accelerate_flags(flags: Sequence[str]) -> list[str]:
    """Replace `--accelerate_config NAME` in flags for `accelerate launch` by `--config_file PATH`."""
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


def thread_flags(flags: Sequence[str], threads: int | None) -> list[str]:
    """Return the flag for `threads` per process (None: cores / processes), where `accelerate launch` would choose one thread.

    The user's own flag and `OMP_NUM_THREADS` have precedence over the default.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--num_cpu_threads_per_process", "--num-cpu-threads-per-process")
    parser.add_argument("--config_file", "--config-file")
    given = parser.parse_known_args(list(flags))[0]
    if given.num_cpu_threads_per_process or (threads is None and "OMP_NUM_THREADS" in os.environ):
        return []
    config = yaml.safe_load(Path(given.config_file).read_text(encoding="utf-8"))
    here = _processes(flags, config.get("num_processes") or 1) // (config.get("num_machines") or 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ["--num_cpu_threads_per_process", str(threads or max(1, cores // max(1, here)))]


def _check_flags(flags: Sequence[str]) -> None:
    """Raise [`UsageError`] for flags that `accelerate launch` would refuse."""
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
