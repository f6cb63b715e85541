"""A pruned checkpoint and text go in; the recovered checkpoint comes out. `accelerate launch` starts `main`."""

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
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ..configuration import builtin
from ..errors import UsageError, WorkError, unknown
from ..files import write_json, write_text
from . import checkpoints
from .request import REQUEST_FILE, check_output, make_request, request_from_yaml


def recover(
    model: str | Path,
    data: Sequence[str],
    output: str | Path,
    *,
    preset: str = "default",
    max_tokens: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    resume: bool = False,
    teacher: str | Path | None = None,
    evaluation: Sequence[str] = (),
    **changes: Any,
) -> Path:
    """Train a checkpoint, in this process (one of several under `accelerate launch`), and write the merged result.

    While it runs, checkpoints lie in `OUTPUT.training`; they are kept if it fails and removed when it is done.

    Args:
        model: folder or Hub id of a causal LM, pruned or not.
        data: names, files or dataset ids (`PATH[:CONFIG]`), each with an optional weight: `books.txt=0.7`.
        output: folder that receives the merged checkpoint, `training_log.json`, and the adapter as `adapter/`.
        preset: name in `presets.PRESETS`.
        max_tokens: training tokens.
        seq_len: tokens per row; None: what the model holds, at most 2048.
        seed: of data order and adapter weights.
        overwrite: replace `output`.
        resume: go on from the last whole checkpoint, to the same weights as if it had never stopped.
        teacher: folder or Hub id of the dense model, to distil from.
        evaluation: texts that will be evaluated on; training on one of them is refused.
        changes: other fields of `presets.Settings`.

    Returns:
        `output`.

    Raises:
        UsageError: the request makes no sense; said before any training.
        WorkError: a loss that is not finite, a full disk; the last whole checkpoint is kept.
    """
    request = make_request(
        model, data, output, preset=preset, seed=seed, overwrite=overwrite, resume=resume, teacher=teacher,
        evaluation=evaluation, **_given(max_tokens, seq_len), **changes,
    )  # fmt: skip
    from .train import train

    return train(request)


def launch(
    model: str | Path,
    data: Sequence[str],
    output: str | Path,
    *,
    preset: str = "default",
    max_tokens: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    resume: bool = False,
    teacher: str | Path | None = None,
    evaluation: Sequence[str] = (),
    accelerate: Sequence[str] = (),
    **changes: Any,
) -> Path:
    """`recover` in processes started by `accelerate launch`.

    Args:
        accelerate: flags for `accelerate launch`; among them `--accelerate_config NAME` takes one of the packaged
            configurations (`single`, `multi_gpu`, `fsdp2`, `zero3`, `cpu_2`) or a file. Without it the number of
            processes and GPUs decides.

    Raises:
        UsageError, WorkError: as `recover`; also WorkError where a process dies.
    """
    request = make_request(
        model, data, output, preset=preset, seed=seed, overwrite=overwrite, resume=resume, teacher=teacher,
        evaluation=evaluation, **_given(max_tokens, seq_len), **changes,
    )  # fmt: skip
    check_output(request)
    with tempfile.TemporaryDirectory(prefix="gqaprune_") as scratch:
        config, failure = Path(scratch) / REQUEST_FILE, Path(scratch) / "failure.json"
        write_text(config, yaml.safe_dump(request.to_dict(), sort_keys=False))
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch", *accelerate_flags(accelerate)),
            *("-m", "hf_gqaprune.trainer.recover", "--config", str(config), "--failure", str(failure)),
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
        return parser.parse_known_args(list(flags))[0].num_processes
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from error


def main(argv: Sequence[str] | None = None) -> int:
    """What `accelerate launch -m hf_gqaprune.trainer.recover --config FILE` runs in each process; the exit code."""
    parser = argparse.ArgumentParser(prog="hf_gqaprune.trainer.recover", description=recover.__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="arguments of recover, as YAML")
    parser.add_argument("--failure", metavar="FILE", help="where a failure is told, as JSON")
    args = parser.parse_args(argv)
    try:
        recover_from(args.config)
    except Exception as error:
        refused = isinstance(error, UsageError)
        expected = isinstance(error, UsageError | WorkError)
        if args.failure:
            message = str(error) if expected else f"{type(error).__name__}: {error}"
            trace = None if expected else traceback.format_exc()
            write_json(args.failure, {"kind": type(error).__name__, "message": message, "traceback": trace})
            # told: the launcher would only add its own traceback. Where one process of several fails by itself, only
            # an exit code ends the others
            if refused or os.environ.get("WORLD_SIZE", "1") == "1":
                return 0
        elif expected:
            print(f"hf_gqaprune.trainer.recover: {error}", file=sys.stderr)
        else:
            raise
        return 2 if refused else 1
    return 0


def recover_from(config: str | Path) -> Path:
    """`recover` with the arguments that a YAML file names."""
    from .train import train

    path = Path(config)
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    return train(request_from_yaml(path.read_text(encoding="utf-8")))


def _given(max_tokens: int | None, seq_len: int | None) -> dict[str, int]:
    """Without what the preset decides."""
    return {name: value for name, value in (("max_tokens", max_tokens), ("seq_len", seq_len)) if value is not None}


if __name__ == "__main__":
    sys.exit(main())
