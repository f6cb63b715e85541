"""Run the command line: one call per verb, and an exit code (0 done, 1 failed while working, 2 refused)."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ..errors import UsageError, WorkError, unknown
from . import arguments, verbs

_EXAMPLES = """\
examples:
  gqaprune run demo                                       the embedded model, the whole way, in minutes
  gqaprune plan MODEL --backbone-ratio 0.2 -o plan.json   what would go; no weights are written
  gqaprune prune MODEL --plan plan.json -o pruned
  gqaprune recover pruned --data notes.txt -o recovered
  gqaprune eval MODEL pruned recovered --data wikitext2

exit codes: 0 done, 1 failed while working, 2 the request makes no sense (said before any work)
"""

AddArguments = Callable[[argparse.ArgumentParser], None]
Run = Callable[[argparse.Namespace], None]

#: verb -> (its arguments, its function, one line of help), in the order of the help
VERBS: dict[str, tuple[AddArguments, Run, str]] = {
    "run": (arguments.run, verbs.run, "everything a recipe says, stage by stage"),
    "plan": (arguments.plan, verbs.plan, "decide what goes and print exact sizes; no weights are written"),
    "prune": (arguments.prune, verbs.prune, "write the smaller checkpoint"),
    "recover": (arguments.recover, verbs.recover, "train a pruned checkpoint under accelerate launch, and merge"),
    "merge": (arguments.merge, verbs.merge, "merge an adapter into its pruned checkpoint"),
    "eval": (arguments.evaluate, verbs.evaluate, "perplexity and lm-eval tasks, on identical tokens"),
    "card": (arguments.card, verbs.card, "write the model card from plan and report"),
    "push": (arguments.push, verbs.push, "verify a checkpoint and send it to the Hub"),
    "export": (arguments.export, verbs.export, "write a GGUF file for llama.cpp and ollama, or a plain Llama"),
    "recipes": (arguments.recipes, verbs.recipes, "list, show or copy the built-in recipes"),
    "env": (arguments.env, verbs.env, "versions, for a bug report"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; an error is one line on stderr, its traceback shown by `--debug`."""
    line = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in line
    try:
        with _no_bars_in_logs(), _told("--quiet" in line):
            _run(line)
    except UsageError as error:
        return _fail(error, 2, debug)
    except WorkError as error:
        return _fail(error, 1, debug)
    except KeyboardInterrupt as error:
        return _fail(error, 1, debug, str(error) or "interrupted")
    except Exception as error:
        return _fail(error, 1, debug, f"{type(error).__name__}: {error} (--debug shows where)")
    return 0


def make_parser() -> arguments.Parser:
    """Build the parser of all verbs; parsed arguments carry the verb's function as `function`."""
    parser = arguments.Parser(
        prog="gqaprune",
        description="Prune Llama-family checkpoints by whole KV groups and FFN channels.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--quiet", action="store_true", help="show no progress, only results, warnings and errors")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, (add_arguments, function, text) in VERBS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        add_arguments(command)
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
        command.add_argument("--quiet", action="store_true", default=argparse.SUPPRESS, help="show no progress")
        command.set_defaults(function=function)
    return parser


@contextmanager
def _told(quiet: bool) -> Iterator[None]:
    """Write the library's warnings, and unless `quiet` its progress and the seconds of each stage, to stderr."""
    package = logging.getLogger("hf_gqaprune")
    # what is chosen for single matrices stays in the log of those who configure one
    talking = [logging.getLogger(f"hf_gqaprune.{name}") for name in ("utils.progress", "pipeline.stages")]
    before = [(logger, logger.level) for logger in talking]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    package.addHandler(handler)
    for logger in talking:
        logger.setLevel(logging.WARNING if quiet else logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        for logger, level in before:
            logger.setLevel(level)


@contextmanager
def _no_bars_in_logs() -> Iterator[None]:
    """Keep other libraries' progress bars out of a log: here and, through the environment, in processes that are started."""
    names = () if sys.stderr.isatty() else ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update({name: "1" for name, value in before.items() if value is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]


def _run(line: list[str]) -> None:
    verb = next((word for word in line if not word.startswith("-")), None)
    if verb is not None and verb not in VERBS:
        raise unknown("command", verb, VERBS)
    parser = make_parser()
    args, rest = parser.parse_known_args(line)
    args.accelerate = rest
    if args.accelerate and verb != "recover":
        command = f"gqaprune {verb}" if verb else "gqaprune"
        raise UsageError(f"unrecognized arguments: {' '.join(args.accelerate)} (see `{command} --help`)")
    if verb is None:
        parser.print_help()
        return
    try:
        args.function(args)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"interrupted{_rest(verb, args)}") from error


def _rest(verb: str, args: argparse.Namespace) -> str:
    """Say how to go on after an interruption, where anything is kept."""
    replayed = verb == "prune" and getattr(args, "plan", None) and getattr(args, "compensation", None) == "none"
    if verb in ("run", "recover") or (verb in ("plan", "prune") and (getattr(args, "memory", None) or replayed)):
        return "; the same command with --resume goes on after the last stage, layer or checkpoint that was finished"
    return ""


def _fail(error: BaseException, code: int, debug: bool, message: str | None = None) -> int:
    if debug:
        traceback.print_exception(error)
    print(f"gqaprune: {' '.join((message or str(error)).split())}", file=sys.stderr)
    return code
