"""Recover a pruned checkpoint by training; `accelerate launch` starts `main` in every process."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..configuration import RecoveryConfig
from ..errors import UsageError, WorkError
from ..utils import write_json
from .request import make_request, request_from_yaml
from .train import train


def recover(
    model: str | os.PathLike[str],
    data: Sequence[str] | RecoveryConfig | None,
    output: str | os.PathLike[str],
    *,
    seed: int = 0,
    evaluation: Sequence[str] = (),
    overwrite: bool = False,
    resume: bool = False,
    **settings: Any,
) -> Path:
    """Train a checkpoint in this process (one of several under `accelerate launch`) and write the merged result.

    Checkpoints are kept in `OUTPUT.training` until the training has finished, also if it fails.

    Args:
        model: folder or Hub id of a causal LM, pruned or not.
        data: names, files or dataset ids (`PATH[:CONFIG]`), each with an optional weight (`books.txt=0.7`); None for the
            preset's data; or a whole [`RecoveryConfig`].
        output: folder that receives the merged checkpoint, `training_log.json`, and the adapter as `adapter/`.
        seed: seeds the order of the data and the adapter's initial weights.
        evaluation: texts that will be evaluated on; training on one of them is refused.
        overwrite: replace `output`.
        resume: continue from the last complete checkpoint, to the same weights as without the interruption.
        settings: fields of [`RecoveryConfig`], such as `preset`, `teacher` or `max_tokens`.

    Returns:
        `output`.

    Raises:
        UsageError: the request makes no sense; raised before any training.
        WorkError: a loss is not finite or the disk is full; the last complete checkpoint is kept.
    """
    return train(
        make_request(
            model, data, output, seed=seed, evaluation=evaluation, overwrite=overwrite, resume=resume, **settings
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run `accelerate launch -m hf_gqaprune.trainer.recovery --config FILE` in one process and return the exit code."""
    parser = argparse.ArgumentParser(prog="hf_gqaprune.trainer.recovery", description=recover.__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="arguments of recover as YAML")
    parser.add_argument("--failure", metavar="FILE", help="file that receives a failure as JSON")
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
            # the launcher would only add its own traceback; if one of several processes fails, though, only an exit
            # code ends the others
            if refused or os.environ.get("WORLD_SIZE", "1") == "1":
                return 0
        elif expected:
            print(f"hf_gqaprune.trainer.recovery: {error}", file=sys.stderr)
        else:
            raise
        return 2 if refused else 1
    return 0


def recover_from(config: str | Path) -> Path:
    """Recover with the arguments in a YAML file."""
    path = Path(config)
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    return train(request_from_yaml(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    sys.exit(main())
