"""Declare the text that a model is calibrated and evaluated on."""

from typing import ClassVar

from .settings import Dtype, Settings, at_least, setting, settings

_DATA = "wikitext2, ptb, demo, a text file, or a dataset id"


@settings
class CalibrationConfig(Settings):
    """Text that statistics are measured on; of named datasets the train split."""

    kind: ClassVar[str] = "calibration setting"

    data: tuple[str, ...] = setting(
        default=("wikitext2",), help=f"text to measure on, drawn from evenly: {_DATA}; books.txt=0.7 gives a weight",
        metavar="NAME_OR_FILE", flag="--calibration",
    )  # fmt: skip
    samples: int = setting(default=128, help="windows in all", check=at_least(1))
    seq_len: int | None = setting(
        default=None, help="tokens per window (default: 2048, or the model's positions if fewer)", check=at_least(1)
    )


@settings
class EvaluationConfig(Settings):
    """What is measured on every checkpoint alike; of named datasets the test split."""

    kind: ClassVar[str] = "evaluation setting"

    data: tuple[str, ...] = setting(default=("wikitext2",), help=f"text to measure on: {_DATA}", metavar="NAME_OR_FILE")
    seq_len: int | None = setting(
        default=None,
        help="window: BOS and N-1 tokens of text (default: 2048, or the positions of the smallest model)",
        check=at_least(1),
    )
    stride: int | None = setting(default=None, help="text tokens between windows (default: seq_len-1)", check=at_least(1))
    max_chars: int | None = setting(default=None, help="only the first N characters of each text", check=at_least(1))
    drop_tail: bool = setting(default=False, help="leave out the last, shorter window")
    tasks: tuple[str, ...] = setting(default=(), help="lm-eval tasks", metavar="T,T,...")
    include_path: str | None = setting(default=None, help="folder of your own lm-eval task files", metavar="DIR")
    limit: int | None = setting(default=None, help="only N examples of each task", check=at_least(1))
    device: str | None = setting(
        default=None, help="cpu, cuda, cuda:N, or auto for all GPUs (default: all GPUs, if any)", metavar="D"
    )
    dtype: Dtype | None = setting(
        default=None, help="dtype to compute in (default: as stored, or float32 where that is faster)", metavar="T"
    )
