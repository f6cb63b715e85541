"""Declare how a pruned model is trained again."""

from typing import Any, ClassVar, Literal, Self

from ..errors import UsageError, unknown
from .settings import Settings, at_least, between, positive, setting, settings

#: schedules of transformers that need no options of their own
Schedule = Literal[
    "cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial", "inverse_sqrt"
]


def _training_split(value: str) -> None:
    if any(part.strip().startswith(("test", "eval")) for part in value.split("+")):
        raise ValueError("is for evaluation and never trains: use train")


def _not_negative(value: float) -> None:
    if value != 0:
        positive(value)


@settings
class RecoveryConfig(Settings):
    """Everything that decides what a recovery does, apart from the model and the seed."""

    kind: ClassVar[str] = "recovery setting"

    data: tuple[str, ...] = setting(
        default=("wikitext2",),
        help="text or examples to train on: wikitext2, ptb, demo, a file, or a dataset id; books.txt=0.7 gives a weight",
        metavar="NAME_OR_FILE",
    )
    preset: str = setting(default="default", help="what settings start from: default, alpaca or alpaca-strong", metavar="P")
    teacher: str | None = setting(
        default=None,
        help="the dense model, to distil from: a folder or Hub id; in a recipe `dense` is the recipe's model",
        metavar="PATH",
    )
    method: Literal["lora", "full"] = setting(
        default="lora", help="lora (every linear of the decoder layers) or full (all weights)"
    )
    rank: int = setting(default=64, help="rank of the LoRA adapter", check=at_least(1))
    alpha: int = setting(default=64, help="alpha of the LoRA adapter", check=at_least(1))
    dropout: float = setting(default=0.0, help="dropout of the LoRA adapter", check=between(0, 1))
    rslora: bool = setting(default=False, help="scale the adapter by alpha / sqrt(rank)")
    dora: bool = setting(default=False, help="decompose weights into magnitude and direction (DoRA)")
    quantize: Literal["4bit"] | None = setting(
        default=None,
        help="4bit loads the base quantized (QLoRA, needs bitsandbytes); the merge uses the weights as they are",
    )
    learning_rate: float | None = setting(
        default=None,
        help="of AdamW (default: 1 / hidden_size for LoRA with alpha = rank, a fifth of it for all weights)",
        check=positive,
    )
    schedule: Schedule = setting(default="cosine", help="learning-rate schedule")
    warmup: float = setting(default=0.05, help="fraction of the steps in which the learning rate rises", check=between(0, 1))
    weight_decay: float = setting(default=0.0, help="of AdamW", check=_not_negative)
    max_grad_norm: float = setting(default=1.0, help="norm that gradients are clipped to", check=positive)
    epochs: int = setting(default=1, help="passes over the training rows", check=at_least(1))
    max_tokens: int | None = setting(
        default=None,
        help="training tokens of one epoch, repeating the data if it is shorter (default: all there are)",
        check=at_least(1),
    )
    seq_len: int | None = setting(
        default=None,
        help="tokens per row, BOS included (default: 2048, or the model's positions if fewer)",
        check=at_least(2),
    )
    batch_tokens: int | None = setting(
        default=None,
        help="tokens per optimizer step, all processes together (default: 16 rows, at most 16384 tokens)",
        check=at_least(1),
    )
    device_tokens: int = setting(default=4096, help="tokens per forward pass on one device", check=at_least(1))
    threads: int | None = setting(
        default=None, help="CPU threads of each process (default: cores / processes)", check=at_least(1)
    )
    packing: bool = setting(default=True, help="put several examples into one row; they do not see each other")
    streaming: bool = setting(default=False, help="read datasets while they download, no further than max_tokens asks")
    split: str = setting(default="train", help="split of datasets; the evaluation split is refused", check=_training_split)
    distillation: float = setting(
        default=0.0, help="weight of the KL divergence from the teacher; cross-entropy has the rest", check=between(0, 1)
    )
    temperature: float = setting(default=1.0, help="temperature of the distillation", check=positive)
    top_k: int = setting(default=64, help="logits of the teacher that are kept; the others count as one", check=at_least(1))
    teacher_cache: bool = setting(
        default=False, help="compute the teacher's logits once, to disk, and train without the teacher in memory"
    )
    blockwise_tokens: int = setting(
        default=0,
        help="tokens, repetitions included, that every block is fitted on before the training itself; 0 leaves it out",
        check=at_least(0),
    )
    held_out_tokens: int = setting(
        default=16384, help="tokens kept out of the training to measure perplexity on", check=at_least(0)
    )
    evaluations: int = setting(default=5, help="how often held-out perplexity is measured", check=at_least(1))
    patience: int | None = setting(
        default=None, help="stop after so many evaluations without improvement", check=at_least(1)
    )
    checkpoints: int = setting(
        default=5, help="checkpoints written in the course of the training; the last two are kept", check=at_least(1)
    )
    activation_checkpointing: bool | None = setting(
        default=None, help="recompute activations instead of keeping them (default: from a billion parameters on)"
    )
    report_to: tuple[str, ...] = setting(
        default=(), help="trackers of transformers' Trainer: tensorboard, wandb, trackio", metavar="T,T"
    )

    @classmethod
    def from_preset(cls, preset: str = "default", **changes: Any) -> Self:
        """Take the settings of `preset` and apply `changes`.

        Without a teacher the preset's distillation is left out; asking for distillation then is an error.

        Raises:
            UsageError: an unknown preset or setting, or a value that makes no sense.
        """
        if preset not in PRESETS:
            raise unknown("preset", preset, PRESETS)
        if changes.get("teacher") is None:
            if changes.get("distillation") or changes.get("blockwise_tokens"):
                raise UsageError("distillation and block-wise fitting need the dense model: pass --teacher")
            changes = {**changes, "distillation": 0.0, "blockwise_tokens": 0}
        config = cls(preset=preset, **{**PRESETS[preset], **changes})
        if config.teacher is not None and not (config.distillation or config.blockwise_tokens):
            raise UsageError(f"preset {preset} does not distil: set distillation, or leave --teacher out")
        return config

    @classmethod
    def _made(cls, values: dict[str, Any]) -> Self:
        return cls.from_preset(**values)

    def validate_method(self) -> None:
        """Refuse settings that contradict each other."""
        if self.method == "full" and self.quantize:
            raise UsageError("quantize=4bit trains an adapter only: use method=lora")
        if self.patience is not None and not self.held_out_tokens:
            raise UsageError("patience needs text to measure on: held_out_tokens is 0")
        if self.streaming and self.max_tokens is None:
            raise UsageError("streaming needs an end: set max_tokens")


_REPORT: dict[str, Any] = {
    "data": ("yahma/alpaca-cleaned",), "dropout": 0.05, "schedule": "linear", "seq_len": 256, "batch_tokens": 16384,
}  # fmt: skip
#: `default` distils where there is a teacher; `alpaca` is what the report trained with (rank 8, 3 epochs),
#: `alpaca-strong` what it suggests
PRESETS: dict[str, dict[str, Any]] = {
    "default": {"max_tokens": 2_000_000, "distillation": 0.7},
    "alpaca": {**_REPORT, "rank": 8, "alpha": 16, "epochs": 3, "learning_rate": 3e-4},
    "alpaca-strong": {**_REPORT, "rank": 16, "alpha": 32, "epochs": 5, "learning_rate": 1e-4},
}
