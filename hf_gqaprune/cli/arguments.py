"""What each verb takes: parsers out. Nothing here imports a model."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import NoReturn

from ..configuration import builtin, settings_help
from ..errors import UsageError
from ..selection import ALLOCATION_NAMES
from ..statistics import CRITERIA, DEFAULT


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, like every other refused request."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


# --- argument types: each refuses in one line what can be refused without reading a file


def ratio(text: str) -> float:
    """A fraction strictly between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and below 1, such as 0.2")
    return value


def rates(text: str) -> tuple[float, ...]:
    """Fractions from 0 to below 1, separated by commas."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0.1,0.2,0.3") from None
    return values


def layers(text: str) -> tuple[int, ...]:
    """Whole numbers, separated by commas; negative ones count from the end."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers such as 0,1,-1") from None


def whole(text: str) -> int:
    """A whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def count(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


# --- what each verb takes


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
    _budget(parser.add_argument_group("how much", "exactly one"))
    units = parser.add_argument_group("which units")
    _choices(units)
    units.add_argument("--compensation", metavar="C", help="what prune will be told; bias counts its biases")
    _calibration(parser.add_argument_group("calibration"))
    _bound(parser.add_argument_group("how"))


def prune(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    _out(parser, "OUT", "the pruned checkpoint (folder)")
    _budget(parser.add_argument_group("how much", "exactly one"), saved_plan=True)
    units = parser.add_argument_group("which units")
    _choices(units)
    units.add_argument(
        "--compensation",
        metavar="C",
        help="natural_gradient (default), least_squares (closed form only, a fraction of the time; default with --memory), "
        "bias (the mean of what went, as biases that count) or none",
    )
    _calibration(parser.add_argument_group("calibration"))
    _bound(parser.add_argument_group("how"))


def recover(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a pruned checkpoint")
    _out(parser, "OUT", "the recovered checkpoint, merged (folder)")
    _data(parser, "text to train on")
    parser.add_argument("--max-tokens", type=count, metavar="N", help="tokens to train on (default: the preset's)")
    parser.add_argument("--seq-len", type=count, metavar="N", help="tokens per training sample")
    parser.add_argument("--teacher", metavar="PATH", help="the dense model, to distil from")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting (listed below): rank=16"
    )
    parser.add_argument(
        "--evaluation", nargs="+", action="extend", default=[], metavar="NAME_OR_FILE",
        help="text that will be evaluated on: training on it is refused",
    )  # fmt: skip
    parser.add_argument("--preset", default="default", metavar="P", help="recovery preset (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "Flags that are not listed go to `accelerate launch`: --num_processes 2, --mixed_precision bf16; beside them\n"
        f"--accelerate_config NAME_OR_FILE takes a packaged configuration ({', '.join(builtin('accelerate'))}) or a file.\n\n"
        f"settings of --set:\n{settings_help()}"
    )


def merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="a LoRA adapter: OUT/adapter of `gqaprune recover`")
    parser.add_argument("--base", metavar="DIR", help="what it was trained on, where that is no longer where it was")
    _out(parser, "OUT", "the merged checkpoint (folder)")


def evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="DIR", help="checkpoints, measured on the same tokens")
    _data(parser, "text to measure on")
    parser.add_argument(
        "--seq-len", type=count, metavar="N",
        help="window: BOS and N-1 tokens of text (default: 2048, or what the checkpoint with the fewest positions has)",
    )  # fmt: skip
    parser.add_argument("--stride", type=count, metavar="N", help="text tokens between windows (default: seq_len-1)")
    parser.add_argument("--max-chars", type=count, metavar="N", help="only the first N characters of each text")
    parser.add_argument("--drop-tail", action="store_true", help="leave out the last, shorter window")
    parser.add_argument("--tasks", metavar="T", help="lm-eval tasks, comma-separated")
    parser.add_argument("--include-path", metavar="DIR", help="folder of your own lm-eval task files")
    parser.add_argument("--limit", type=count, metavar="N", help="only N examples of each task")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--report", action="store_true",
        help="of DENSE PRUNED [RECOVERED]: write report.json and report.png, which a card shows, into the last",
    )  # fmt: skip
    _overwrite(parser)
    _device(parser, "all GPUs")


def card(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a checkpoint with prune_plan.json and report.json")
    parser.add_argument("--base-model", required=True, metavar="ID", help="Hub id of the dense model")
    parser.add_argument("--license", metavar="L", help="licence (default: the base model's)")
    parser.add_argument("--name", metavar="ORG/NAME", help="where it will be on the Hub (default: the folder's name)")
    _overwrite(parser)


def push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a checkpoint")
    parser.add_argument("repo_id", metavar="ORG/NAME", help="where to on the Hub")
    parser.add_argument("--private", action="store_true", help="create the repository private")
    parser.add_argument("--dry-run", action="store_true", help="list what would be sent")


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
    """Nothing."""


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a local folder, a Hub id, or demo")


def _out(parser: argparse.ArgumentParser, metavar: str, text: str) -> None:
    parser.add_argument("-o", "--output", required=True, metavar=metavar, help=text)
    _overwrite(parser)


def _overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output, never a folder of anything else")


def _data(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument(
        "--data", nargs="+", action="extend", default=[], metavar="NAME_OR_FILE",
        help=f"{text}: wikitext2, ptb, demo, a text file, or a dataset id",
    )  # fmt: skip


def _budget(group: argparse._ArgumentGroup, *, saved_plan: bool = False) -> None:
    budget = group.add_mutually_exclusive_group(required=True)
    if saved_plan:
        budget.add_argument("--plan", metavar="FILE", help="a saved plan")
    budget.add_argument("--ratio", type=ratio, metavar="R", help="fraction of all parameters to remove")
    budget.add_argument("--backbone-ratio", type=ratio, metavar="R", help="fraction of the decoder layers to remove")
    budget.add_argument("--rates", type=rates, metavar="R,R,...", help="one fraction per layer (allocation per_layer)")


def _choices(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--criterion", metavar="C", help=f"how units are ranked: {_listed(CRITERIA, DEFAULT)}")
    group.add_argument(
        "--allocation", metavar="A", help=f"how the budget is split over layers: {_listed(ALLOCATION_NAMES, 'global')}"
    )
    group.add_argument(
        "--temperature", type=float, metavar="T",
        help="layer_importance: from 0.01, the least important layers bear it all, over 1 (default) to all alike",
    )  # fmt: skip
    group.add_argument(
        "--attention-share", type=float, metavar="S",
        help="global: fraction of what goes that attention blocks give (default: by cost)",
    )  # fmt: skip
    floors = {"--min-kv-heads": "KV groups", "--min-ffn": "FFN channels"}
    for flag, unit in floors.items():
        group.add_argument(
            flag, type=whole, metavar="N", help=f"{unit} that every block keeps; 0 lets blocks go (default: 1)"
        )
    group.add_argument(
        "--keep-layers", type=layers, metavar="I,I,...",
        help="layers that stay untouched, counted from 0, or from the end: --keep-layers=-1,0",
    )  # fmt: skip
    group.add_argument(
        "--round-to", type=count, metavar="N", help="make FFN widths multiples of N; the ratio is then met to half of that"
    )


def _listed(names: Iterable[str], default: str) -> str:
    return ", ".join(f"{name} (default)" if name == default else name for name in names)


def _bound(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--memory", metavar="SIZE",
        help="bound on the memory of the GPU, or of the process where none is used, such as 8GiB: the model is read layer by "
        "layer, the rest waits on disk, or beside a GPU in the memory of the host",
    )  # fmt: skip
    _device(group)
    group.add_argument(
        "--resume", action="store_true",
        help="go on after the last layer that an interrupted call finished: with --memory, or a saved plan without "
        "compensation",
    )  # fmt: skip


def _device(group: argparse._ActionsContainer, default: str = "the first") -> None:
    group.add_argument("--device", metavar="D", help=f"cpu, cuda, cuda:N, or auto: all GPUs (default: {default}, if any)")


def _calibration(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--calibration", nargs="+", action="extend", metavar="NAME_OR_FILE",
        help="text to measure on: wikitext2 (default), ptb, demo, a text file, or a dataset id",
    )  # fmt: skip
    group.add_argument("--samples", type=count, metavar="N", help="windows in all (default: 128)")
    group.add_argument("--seq-len", type=count, metavar="N", help="tokens per window (default: 2048, or what the model has)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the windows and of ties (default: %(default)s)")
    group.add_argument("--statistics", metavar="DIR", help="saved statistics instead of a calibration pass")
    group.add_argument("--save-statistics", metavar="DIR", help="keep what the calibration pass measured")
