"""Define what each verb takes; nothing here imports torch or transformers."""

from __future__ import annotations

import argparse
import textwrap
from typing import NoReturn

from ..configuration import (
    PRESETS,
    CalibrationConfig,
    CardConfig,
    EvaluationConfig,
    PruneRequest,
    PruningConfig,
    Recipe,
    RecoveryConfig,
    builtin,
)
from ..errors import UsageError
from .flags import add_flags

#: fields of `PruningConfig` that say how the work is done, not what is removed
HOW = ("memory", "device", "dtype")
_BUDGET = ("ratio", "backbone_ratio", "rates")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, like every other refused request."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file or the name of a built-in recipe")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one value: prune.ratio=0.25"
    )
    parser.add_argument("--resume", action="store_true", help="keep finished stages whose inputs are unchanged")
    _overwrite(parser)


def plan(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    _out(parser, "plan.json", "the plan (JSON)")
    _pruning(parser, skip=("plan",))


def prune(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    _out(parser, "OUT", "the pruned checkpoint (folder)")
    _pruning(parser)


def recover(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a pruned checkpoint")
    _out(parser, "OUT", "the recovered checkpoint, merged (folder)")
    add_flags(parser.add_argument_group("training"), RecoveryConfig)
    parser.add_argument(
        "--evaluation", nargs="+", action="extend", default=[], metavar="NAME_OR_FILE",
        help="text that will be evaluated on: training on it is refused",
    )  # fmt: skip
    add_flags(parser, Recipe, only=("seed",))
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    presets = "\n".join(
        textwrap.fill(f"{name}: {', '.join(f'{key}={value}' for key, value in changes.items())}", 110, subsequent_indent="  ")
        for name, changes in PRESETS.items()
    )
    parser.epilog = (
        "Flags that are not listed go to `accelerate launch`: --num_processes 2, --mixed_precision bf16; beside them\n"
        f"--accelerate_config NAME_OR_FILE takes a packaged configuration ({', '.join(builtin('accelerate'))}) or a file.\n\n"
        f"What the presets change:\n{presets}"
    )


def merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="a LoRA adapter: OUT/adapter of `gqaprune recover`")
    parser.add_argument("--base", metavar="DIR", help="what it was trained on, if that has moved")
    _out(parser, "OUT", "the merged checkpoint (folder)")


def evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="DIR", help="checkpoints, measured on the same tokens")
    add_flags(parser, EvaluationConfig)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--report", action="store_true",
        help="of DENSE PRUNED [RECOVERED]: write report.json and report.png, which a card shows, into the last",
    )  # fmt: skip
    _overwrite(parser)


def card(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a checkpoint with prune_plan.json and report.json")
    parser.add_argument("--base-model", required=True, metavar="ID", help="Hub id of the dense model")
    add_flags(parser, CardConfig)
    _overwrite(parser)


def push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a checkpoint")
    parser.add_argument("repo_id", metavar="ORG/NAME", help="repository on the Hub")
    parser.add_argument("--private", action="store_true", help="create the repository private")
    parser.add_argument("--dry-run", action="store_true", help="list what would be sent")


def export(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("--to", required=True, metavar="FORMAT", help="gguf (one file) or llama (a folder)")
    _out(parser, "OUT", "the new file, its name ending in .gguf, or folder")
    gguf = parser.add_argument_group("gguf")
    gguf.add_argument(
        "--dtype", default="auto", metavar="D", help="of matrices: f32, f16, bf16, q8_0, or auto, the checkpoint's (default)"
    )
    gguf.add_argument(
        "--tokenizer-from", metavar="FILE", help="copy the tokenizer of this GGUF file of the base model instead of converting"
    )
    llama = parser.add_argument_group("llama")
    llama.add_argument("--pad", action="store_true", help="fill layers of different sizes with zeros; outputs stay equal")


def recipes(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION", title="actions", dest="action")
    actions.add_parser("ls", help="names and what they do", allow_abbrev=False)
    show = actions.add_parser("show", help="print one", allow_abbrev=False)
    show.add_argument("name", metavar="NAME")
    copy = actions.add_parser("cp", help="copy one, to edit it", allow_abbrev=False)
    copy.add_argument("name", metavar="NAME")
    copy.add_argument("file", metavar="FILE")
    _overwrite(copy)


def env(parser: argparse.ArgumentParser) -> None:
    """Take nothing."""


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a local folder, a Hub id, or demo")


def _out(parser: argparse.ArgumentParser, metavar: str, text: str) -> None:
    parser.add_argument("-o", "--output", required=True, metavar=metavar, help=text)
    _overwrite(parser)


def _overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output, never a folder of anything else")


def _pruning(parser: argparse.ArgumentParser, skip: tuple[str, ...] = ()) -> None:
    budget = parser.add_argument_group("how much", "exactly one")
    add_flags(budget, PruneRequest, only=("plan",), skip=skip)
    add_flags(budget, PruningConfig, only=_BUDGET)
    add_flags(parser.add_argument_group("which units"), PruningConfig, skip=(*_BUDGET, *HOW))
    measuring = parser.add_argument_group("calibration")
    add_flags(measuring, CalibrationConfig)
    add_flags(measuring, PruneRequest, only=("seed", "statistics", "save_statistics"))
    how = parser.add_argument_group("how")
    add_flags(how, PruningConfig, only=HOW)
    how.add_argument(
        "--resume", action="store_true",
        help="go on after the last layer that an interrupted call finished: with --memory, or a saved plan without "
        "compensation",
    )  # fmt: skip
