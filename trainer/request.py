"""What one recovery was asked to do: checked before any work, written for `accelerate launch`, compared on resume."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ..checkpoint import ModelFolder, resolve_model
from ..configuration import PRESET_DATA, Settings, resolve
from ..data import text_paths
from ..errors import UsageError, unknown
from ..utils import alone, occupied, refuse_existing, refuse_lost
from .models import check_trackers, quantization

#: in the folder of an unfinished training
REQUEST_FILE = "recover.yaml"
#: default of `seq_len` where the model has longer positions
_SEQ_LEN = 2048
#: a step of the default preset: rows, and tokens where rows are long
_ROWS, _MOST_TOKENS = 16, 16384
#: learning rate times hidden size: what a weight may change by in one step of Adam shrinks with the width it sums over
_RATE = {"lora": 1.0, "full": 0.2}
#: of numpy, which transformers seeds too
_LARGEST_SEED = 2**32 - 1
#: fields that may differ between an interrupted run and the one that resumes it
_FREE = ("overwrite", "resume")


@dataclass(frozen=True)
class Request:
    """One recovery.

    Attributes:
        model: folder or Hub id of the checkpoint to train.
        data: training sources.
        output: folder of the recovered checkpoint.
        settings: how to train; `seq_len`, `batch_tokens` and `learning_rate` are set.
        seed: of data order and adapter weights.
        teacher: folder or Hub id of the dense model, None without distillation.
        evaluation: texts that will be evaluated on; refused as training data.
        overwrite: replace `output` and an unfinished training.
        resume: go on from the last whole checkpoint.
    """

    model: str
    data: tuple[str, ...]
    output: str
    settings: Settings
    seed: int = 0
    teacher: str | None = None
    evaluation: tuple[str, ...] = ()
    overwrite: bool = False
    resume: bool = False

    @property
    def work(self) -> Path:
        """Folder of the training while it is unfinished, beside `output`."""
        output = Path(self.output)
        return output.parent / f"{output.name}.training"

    def to_dict(self) -> dict[str, Any]:
        """Arguments of `make_request` that make an equal request, JSON-ready."""
        values = asdict(self)
        settings = values.pop("settings")
        return _plain({**values, **settings})


def make_request(
    model: str | Path | ModelFolder,
    data: Sequence[str],
    output: str | Path,
    *,
    preset: str = "default",
    seed: int = 0,
    overwrite: bool = False,
    resume: bool = False,
    teacher: str | Path | None = None,
    evaluation: Sequence[str] = (),
    **changes: Any,
) -> Request:
    """Check everything that can be checked without reading the training text. Raises [`UsageError`] as `recover`."""
    settings = _resolved(preset, changes, teacher is not None)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= _LARGEST_SEED:
        raise UsageError(f"seed={seed!r} must be a whole number from 0 to {_LARGEST_SEED}")
    sources = tuple([data] if isinstance(data, str) else data) or PRESET_DATA.get(preset, ())
    if not sources:
        raise UsageError("no training text was named: pass --data NAME_OR_FILE")
    folder = resolve_model(model)
    config = folder.config
    folder.check_weights()
    limit = getattr(config, "max_position_embeddings", None)
    seq_len = settings.seq_len or min(_SEQ_LEN, limit or _SEQ_LEN)
    if limit is not None and seq_len > limit:
        raise UsageError(f"seq_len={seq_len} is longer than the {limit} positions of {folder}: lower --seq-len")
    models = [folder]
    if teacher is not None:
        models.append(resolve_model(teacher))
        vocabulary = models[-1].config.vocab_size
        if vocabulary != config.vocab_size:
            raise UsageError(
                f"the teacher {teacher} has a vocabulary of {vocabulary}, {folder} one of {config.vocab_size}: "
                "give the dense model it was pruned from"
            )
    quantization(settings)
    check_trackers(settings)
    request = Request(
        model=str(model),
        data=sources,
        output=str(output),
        settings=replace(
            settings,
            seq_len=seq_len,
            batch_tokens=settings.batch_tokens or min(_ROWS * seq_len, _MOST_TOKENS),
            learning_rate=settings.learning_rate or _RATE[settings.method] / config.hidden_size,
        ),
        seed=seed,
        teacher=None if teacher is None else str(teacher),
        evaluation=tuple(evaluation),
        overwrite=overwrite,
        resume=resume,
    )
    for replaced in (request.output, request.work):
        refuse_lost(replaced, [*models, *text_paths((*sources, *evaluation))])
    return request


def request_from_yaml(text: str) -> Request:
    """The request whose arguments for `make_request` are in `text`. Raises [`UsageError`] for what is not one."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"the recovery's configuration is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise UsageError("the recovery's configuration must be a mapping, with model, data and output")
    names = [name for name in inspect.signature(make_request).parameters if name != "changes"]
    names += Settings.__dataclass_fields__
    for name in data:
        if name not in names:
            raise unknown("key in the recovery's configuration:", name, names)
    for name in ("model", "output"):
        if name not in data:
            raise UsageError(f"the recovery's configuration does not name {name}")
    return make_request(**{"data": (), **data})


def check_output(request: Request) -> None:
    """Refuse what would overwrite a result, or go on with an unfinished training of another kind."""
    refuse_existing(request.output, request.overwrite)
    record = request.work / REQUEST_FILE
    if not record.is_file():
        if occupied(request.work):
            raise UsageError(f"{request.work}, where the training would be kept, is something else: move it away")
        return
    with alone(request.work):
        pass
    if request.overwrite and not request.resume:
        return
    if not request.resume:
        raise UsageError(f"{request.work} holds an unfinished training: pass --resume, or --overwrite to start anew")
    before, now = yaml.safe_load(record.read_text(encoding="utf-8")), request.to_dict()
    differing = [name for name in now if name not in _FREE and before.get(name) != now[name]]
    if differing:
        raise UsageError(
            f"{request.work} was started with other values of {', '.join(differing)}: repeat them, or start anew with "
            "--overwrite and without --resume"
        )


def _resolved(preset: str, changes: Mapping[str, Any], has_teacher: bool) -> Settings:
    settings = resolve(preset, changes)
    if has_teacher:
        if not (settings.distillation or settings.blockwise_tokens):
            raise UsageError(f"preset {preset} has no use for a teacher: set distillation, or leave --teacher out")
        return settings
    if changes.get("distillation") or changes.get("blockwise_tokens"):
        raise UsageError("distillation and block-wise reconstruction need the dense model: pass --teacher")
    return replace(settings, distillation=0.0, blockwise_tokens=0)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
