"""A preset's name and what the user changes go in; the settings of one recovery come out."""

from __future__ import annotations

import inspect
import json
import math
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import UsageError, unknown

METHODS = ("lora", "full")
#: schedules of transformers that need no options of their own
SCHEDULES = (
    *("cosine", "linear", "constant", "constant_with_warmup"),
    *("cosine_with_restarts", "polynomial", "inverse_sqrt"),
)


def _at_least(name: str, value: Any, least: int, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{name}={value!r} must be a whole number from {least}")


def _between(name: str, value: Any, low: float, high: float, closed: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and ((low <= value <= high) if closed else (low < value < high))):
        bounds = f"from {low} to {high}" if closed else "positive and finite"
        raise UsageError(f"{name}={value!r} must be {bounds}")


def _flag(name: str, value: Any, optional: bool = False) -> None:
    if not (isinstance(value, bool) or (value is None and optional)):
        raise UsageError(f"{name}={value!r} must be true or false")


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a recovery does, apart from model, data and seed.

    Attributes:
        method: `lora` (every linear module of the decoder layers) or `full` (all weights).
        rank, alpha, dropout, rslora, dora: of the LoRA adapter, as in `peft.LoraConfig`.
        quantize: `4bit` loads the base quantized (QLoRA, needs bitsandbytes); the merge uses the weights as they are.
        learning_rate: of AdamW; None: `1 / hidden_size` for LoRA with alpha = rank, a fifth of it for all weights.
        schedule, warmup, weight_decay, max_grad_norm: of AdamW; `warmup` is a fraction of the steps, `schedule` one of
            cosine, linear, constant, constant_with_warmup, cosine_with_restarts, polynomial, inverse_sqrt.
        epochs: passes over the training rows.
        max_tokens: training tokens of one epoch, repeating the data if it is shorter; None: all there are.
        seq_len: tokens per row, BOS included; None: `min(2048, max_position_embeddings)`.
        batch_tokens: tokens per optimizer step, all processes together; None: 16 rows, at most 16,384 tokens.
        device_tokens: tokens per forward pass on one device.
        packing: put several examples into one row (they do not see each other); text windows fill their row anyway.
        streaming: read datasets while they download, no further than `max_tokens` asks.
        split: of datasets; the evaluation split is refused.
        distillation: weight of the KL divergence from the teacher; cross-entropy has the rest. Only with a teacher.
        temperature: of the distillation.
        top_k: logits of the teacher that are kept; the others count as one.
        teacher_cache: compute the teacher's logits once, to disk, and train without the teacher in memory.
        blockwise_tokens: tokens, repetitions included, that every block is fitted on before the training itself
            (block-wise reconstruction); 0 leaves it out.
        held_out_tokens: tokens kept out of the training to measure perplexity on.
        evaluations: how often that happens.
        patience: stop after so many evaluations without improvement, and keep the best weights.
        checkpoints: how many are written in the course of the training; the last two are kept.
        activation_checkpointing: None: for models of a billion parameters or more.
        report_to: trackers of transformers' `Trainer`: `tensorboard`, `wandb`, `trackio`.
    """

    method: str = "lora"
    rank: int = 64
    alpha: int = 64
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    quantize: str | None = None
    learning_rate: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    epochs: int = 1
    max_tokens: int | None = None
    seq_len: int | None = None
    batch_tokens: int | None = None
    device_tokens: int = 4096
    packing: bool = True
    streaming: bool = False
    split: str = "train"
    distillation: float = 0.0
    temperature: float = 1.0
    top_k: int = 64
    teacher_cache: bool = False
    blockwise_tokens: int = 0
    held_out_tokens: int = 16384
    evaluations: int = 5
    patience: int | None = None
    checkpoints: int = 5
    activation_checkpointing: bool | None = None
    report_to: tuple[str, ...] = ()

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Settings:
        """Settings from plain values, as YAML gives them; what is not named has its default.

        Raises:
            UsageError: for an unknown name, or a value that makes no sense.
        """
        for name in values:
            if name not in Settings.__dataclass_fields__:
                raise unknown("recovery setting", name, Settings.__dataclass_fields__)
        return Settings(**{name: _value(name, value) for name, value in values.items()})

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("method", self.method, METHODS)
        if self.quantize not in (None, "4bit"):
            raise unknown("quantize", self.quantize, ["4bit"])
        if self.method == "full" and self.quantize:
            raise UsageError("quantize=4bit trains an adapter only: use method=lora")
        counts = ("rank", "alpha", "epochs", "device_tokens", "top_k", "evaluations", "checkpoints")
        for name in counts:
            _at_least(name, getattr(self, name), 1)
        for name in ("max_tokens", "batch_tokens", "patience"):
            _at_least(name, getattr(self, name), 1, optional=True)
        _at_least("seq_len", self.seq_len, 2, optional=True)
        for name in ("blockwise_tokens", "held_out_tokens"):
            _at_least(name, getattr(self, name), 0)
        for name in ("temperature", "max_grad_norm"):
            _between(name, getattr(self, name), 0, math.inf)
        if self.learning_rate is not None:
            _between("learning_rate", self.learning_rate, 0, math.inf)
        if self.weight_decay != 0:
            _between("weight_decay", self.weight_decay, 0, math.inf)
        for name in ("dropout", "warmup", "distillation"):
            _between(name, getattr(self, name), 0, 1, closed=True)
        for name in ("rslora", "dora", "packing", "streaming", "teacher_cache"):
            _flag(name, getattr(self, name))
        _flag("activation_checkpointing", self.activation_checkpointing, optional=True)
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        if self.patience is not None and not self.held_out_tokens:
            raise UsageError("patience needs text to measure on: held_out_tokens is 0")
        if self.streaming and self.max_tokens is None:
            raise UsageError("streaming needs an end: set max_tokens")
        if not isinstance(self.split, str):
            raise UsageError(f"split={self.split!r} must be the name of a split")
        if any(part.strip().startswith(("test", "eval")) for part in self.split.split("+")):
            raise UsageError(f"split={self.split} is for evaluation and never trains: use train")


def _value(name: str, value: Any) -> Any:
    if name == "report_to":
        return (value,) if isinstance(value, str) else tuple(value or ())
    # YAML 1.1 reads 1e-4 as a text
    if isinstance(value, str) and "float" in Settings.__dataclass_fields__[name].type:
        try:
            return float(value)
        except ValueError:
            return value
    return value


_REPORT = Settings(dropout=0.05, schedule="linear", seq_len=256, batch_tokens=16384)
#: `default` distils where there is a teacher; `alpaca` is what the report trained with (rank 8, 3 epochs),
#: `alpaca-strong` what it suggests
PRESETS: dict[str, Settings] = {
    "default": Settings(max_tokens=2_000_000, distillation=0.7),
    "alpaca": replace(_REPORT, rank=8, alpha=16, epochs=3, learning_rate=3e-4),
    "alpaca-strong": replace(_REPORT, rank=16, alpha=32, epochs=5, learning_rate=1e-4),
}
#: what a preset trains on where the user names no data
PRESET_DATA: dict[str, tuple[str, ...]] = {
    "alpaca": ("yahma/alpaca-cleaned",),
    "alpaca-strong": ("yahma/alpaca-cleaned",),
}


def resolve(preset: str, changes: Mapping[str, Any]) -> Settings:
    """The settings of `preset` with `changes` applied.

    Raises:
        UsageError: for an unknown preset or setting, or a value that makes no sense.
    """
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    return Settings.from_dict({**asdict(PRESETS[preset]), **changes})


def settings_help() -> str:
    """What `Settings` says of each field, and the defaults, to be printed; values as YAML writes them."""
    described = (inspect.getdoc(Settings) or "").partition("Attributes:\n")[2].rstrip().replace("None:", "null:")
    written = (
        f"{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in asdict(PRESETS["default"]).items()
    )
    return f"{described}\n\n{textwrap.fill('defaults: ' + ', '.join(written), 119)}"
