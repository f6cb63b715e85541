"""Check a recovery request, write it for `accelerate launch`, and compare it on resume."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from ..checkpoint import resolve_model
from ..configuration import Recipe, RecoveryConfig
from ..data import text_paths
from ..errors import UsageError, on_one_line, unknown
from ..utils import exclusive_lock, is_occupied, refuse_existing, refuse_overwriting_inputs
from .models import check_trackers, quantization

#: file in the folder of an unfinished training
REQUEST_FILE = "recover.yaml"
#: default of `seq_len`, if the model has as many positions
_SEQ_LEN = 2048
#: default of `batch_tokens`: rows per step, and the most tokens per step
_ROWS, _MOST_TOKENS = 16, 16384
#: learning rate times hidden size: the wider a sum, the smaller a step Adam may take in each of its weights
_RATE = {"lora": 1.0, "full": 0.2}
#: fields that may differ between an interrupted run and the one that resumes it
_FREE = ("overwrite", "resume")


@dataclass(frozen=True)
class Request:
    """A checked recovery.

    Attributes:
        model: folder or Hub id of the checkpoint to train.
        config: data and settings, with `seq_len`, `batch_tokens` and `learning_rate` set.
        output: folder of the recovered checkpoint.
        seed: seeds the order of the data and the adapter's initial weights.
        evaluation: texts that will be evaluated on; refused as training data.
        overwrite: replace `output` and an unfinished training.
        resume: continue from the last complete checkpoint.
    """

    model: str
    config: RecoveryConfig
    output: str
    seed: int = 0
    evaluation: tuple[str, ...] = ()
    overwrite: bool = False
    resume: bool = False

    @property
    def work(self) -> Path:
        """Folder of the unfinished training, beside `output`."""
        output = Path(self.output)
        return output.parent / f"{output.name}.training"

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments of `make_request` that make an equal request, JSON-ready."""
        values = {spec.name: getattr(self, spec.name) for spec in fields(self) if spec.name != "config"}
        return {**values, "evaluation": list(self.evaluation), **self.config.to_dict()}


def make_request(
    model: str | os.PathLike[str],
    data: Sequence[str] | RecoveryConfig | None,
    output: str | os.PathLike[str],
    *,
    seed: int = 0,
    evaluation: Sequence[str] = (),
    overwrite: bool = False,
    resume: bool = False,
    **settings: Any,
) -> Request:
    """Check everything that can be checked without reading the training text; see [`recover`] for the arguments.

    Raises:
        UsageError: the request makes no sense.
    """
    if settings.get("teacher") is not None:
        settings["teacher"] = os.fspath(settings["teacher"])
    if isinstance(data, RecoveryConfig):
        config = replace(data, **settings)
    else:
        if data is not None:
            settings["data"] = (data,) if isinstance(data, str) else tuple(data)
        config = RecoveryConfig.from_preset(**settings)
    if problem := Recipe.problem("seed", seed):
        raise UsageError(problem)
    if not config.data:
        raise UsageError("no training text was given: pass --data NAME_OR_FILE")
    folder = resolve_model(model)
    folder.check_weights()
    limit = getattr(folder.config, "max_position_embeddings", None)
    seq_len = config.seq_len or min(_SEQ_LEN, limit or _SEQ_LEN)
    if limit is not None and seq_len > limit:
        raise UsageError(f"seq_len={seq_len} is longer than the {limit} positions of {folder}: lower --seq-len")
    read = [folder]
    if config.teacher is not None:
        teacher = resolve_model(config.teacher)
        teacher.check_weights()
        read.append(teacher)
        vocabulary = teacher.config.vocab_size
        if vocabulary != folder.config.vocab_size:
            raise UsageError(
                f"the teacher {config.teacher} has a vocabulary of {vocabulary}, {folder} one of "
                f"{folder.config.vocab_size}: give the dense model it was pruned from"
            )
    quantization(config)
    check_trackers(config)
    resolved = replace(
        config,
        seq_len=seq_len,
        batch_tokens=config.batch_tokens or min(_ROWS * seq_len, _MOST_TOKENS),
        learning_rate=config.learning_rate or _RATE[config.method] / folder.config.hidden_size,
    )
    request = Request(os.fspath(model), resolved, os.fspath(output), seed, tuple(evaluation), overwrite, resume)
    for replaced in (request.output, request.work):
        refuse_overwriting_inputs(replaced, [*read, *text_paths((*config.data, *evaluation))])
    return request


def request_from_yaml(text: str) -> Request:
    """Read the request whose arguments for `make_request` are in `text`. Raises [`UsageError`] for anything else."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"the recovery's configuration is not YAML: {on_one_line(error)}") from error
    if not isinstance(values, dict):
        raise UsageError("the recovery's configuration must be a mapping, with model, data and output")
    names = [spec.name for spec in fields(Request) if spec.name != "config"]
    for name in values:
        if name not in names and name not in RecoveryConfig.names():
            raise unknown("key in the recovery's configuration:", name, [*names, *RecoveryConfig.names()])
    for name in ("model", "output"):
        if name not in values:
            raise UsageError(f"the recovery's configuration does not name {name}")
    config = RecoveryConfig.from_dict({name: value for name, value in values.items() if name not in names})
    own = {name: value for name, value in values.items() if name in names and name not in ("model", "output")}
    return make_request(values["model"], config, values["output"], **own)


def check_output(request: Request) -> None:
    """Raise [`UsageError`] if `request` would replace a result, or continue an unfinished training of other settings."""
    refuse_existing(request.output, request.overwrite)
    record = request.work / REQUEST_FILE
    if not record.is_file():
        if is_occupied(request.work):
            raise UsageError(f"{request.work}, where the training would be kept, holds other files: move it away")
        return
    with exclusive_lock(request.work):
        pass
    if request.overwrite and not request.resume:
        return
    if not request.resume:
        raise UsageError(f"{request.work} holds an unfinished training: pass --resume, or --overwrite to start again")
    before, now = yaml.safe_load(record.read_text(encoding="utf-8")), request.to_dict()
    differing = [name for name in now if name not in _FREE and before.get(name) != now[name]]
    if differing:
        raise UsageError(
            f"{request.work} was started with other values of {', '.join(differing)}: repeat them, or start again with "
            "--overwrite and without --resume"
        )
