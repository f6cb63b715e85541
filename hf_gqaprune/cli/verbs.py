"""What each verb does: parsed arguments in, one call, what it says to stdout. Heavy imports stay inside."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, unknown
from ..utils import refuse_existing, refuse_lost, write_text

if TYPE_CHECKING:
    from ..pipeline import PruneRequest


def run(args: argparse.Namespace) -> None:
    """Everything a recipe says."""
    from ..configuration import Recipe, builtin_names
    from ..pipeline import run as run_recipe

    recipe = Recipe.load(args.recipe, args.set)
    if not args.resume and args.recipe not in builtin_names():
        refuse_lost(recipe.output, [args.recipe])
    print(run_recipe(recipe, resume=args.resume, overwrite=args.overwrite))


def plan(args: argparse.Namespace) -> None:
    """Decide and print; write the plan alone."""
    from ..pipeline import plan_model
    from ..utils import distributed

    chosen = plan_model(_prune_request(args), args.output, overwrite=args.overwrite, resume=args.resume)
    if distributed.index() == 0:
        print(f"{chosen}\n\nwritten to {args.output}")


def prune(args: argparse.Namespace) -> None:
    """Write the smaller checkpoint."""
    from ..checkpoint import named, read_identity
    from ..pipeline import prune_model
    from ..utils import distributed

    chosen = prune_model(_prune_request(args), args.output, overwrite=args.overwrite, resume=args.resume)
    if distributed.index() == 0:
        texts = named((read_identity(Path(args.output)) or {}).get("calibration", ()))
        print(f"{chosen}\n\nwritten to {args.output}" + (f", calibrated on {texts}" if texts else ""))


def recover(args: argparse.Namespace) -> None:
    """Train and merge under accelerate launch."""
    from ..configuration import Settings, assignment
    from ..trainer import launch

    flags = {name: getattr(args, name) for name in ("max_tokens", "seq_len") if getattr(args, name) is not None}
    settings: dict[str, Any] = {}
    for key, value in (assignment(override, "rank=16") for override in args.set):
        if key not in Settings.__dataclass_fields__:
            raise unknown("recovery setting", key, Settings.__dataclass_fields__)
        if key in flags:
            raise UsageError(f"--set {key}={value}: --{key.replace('_', '-')} {flags[key]} is given already")
        settings[key] = value
    launch(
        args.folder,
        args.data,
        args.output,
        preset=args.preset,
        seed=args.seed,
        overwrite=args.overwrite,
        resume=args.resume,
        teacher=args.teacher,
        evaluation=args.evaluation,
        accelerate=args.accelerate,
        **flags,
        **settings,
    )
    print(f"written to {args.output}")


def merge(args: argparse.Namespace) -> None:
    """Merge an adapter."""
    from ..trainer import merge as merge_adapter

    print(f"written to {merge_adapter(args.adapter, args.output, base=args.base, overwrite=args.overwrite)}")


def evaluate(args: argparse.Namespace) -> None:
    """Perplexities and tasks of one or several checkpoints, and the report that compares them."""
    from ..checkpoint import resolve_model
    from ..data import load_text
    from ..evaluation import REPORT, Measurement, compared, measure, task_manager, write_report
    from ..utils import choose

    choose(args.device)
    tasks = args.tasks.split(",") if args.tasks else []
    if not args.data and not tasks:
        raise UsageError("nothing to evaluate: pass --data NAME_OR_FILE or --tasks T")
    if args.overwrite and not args.report:
        raise UsageError("--overwrite is for the report: add --report, or leave it out")
    texts = tuple(load_text(name, split="test") for name in args.data)
    folders = {name: resolve_model(name) for name in args.models}
    stages = compared(folders, texts, args.overwrite) if args.report else {}
    if tasks:
        task_manager(tasks, args.include_path)
    what = Measurement(
        texts=texts,
        seq_len=args.seq_len,
        stride=args.stride,
        drop_tail=args.drop_tail,
        max_chars=args.max_chars,
        tasks=tuple(tasks),
        include_path=args.include_path,
        limit=args.limit,
        device=args.device,
    )
    found = {}
    for name, measured in measure(folders, what, "--device cpu uses no GPU"):
        found[name] = measured
        if not args.json:
            told = measured.tasks or {}
            lines = [str(result) for result in measured.perplexity]
            lines += [f"{task} {metric}: {value:.4f}" for task, ms in told.items() for metric, value in ms.items()]
            print("\n  ".join([name, *lines]), flush=True)
    if args.json:
        plain = {
            name: {"perplexity": [result.to_dict() for result in measured.perplexity], "tasks": measured.tasks or {}}
            for name, measured in found.items()
        }
        print(json.dumps(plain, indent=2))
    if stages:
        dense, last = args.models[0], folders[args.models[-1]].path
        # the name, not where somebody keeps it
        model = Path(dense).resolve().name if Path(dense).exists() else dense
        report = write_report(model, stages, found.values(), last)
        if not args.json:
            print(f"\n{report.table()}\n\nwritten to {last / REPORT}")


def card(args: argparse.Namespace) -> None:
    """Write the model card."""
    from ..model_cards import create_model_card

    path = create_model_card(
        args.folder, base_model=args.base_model, license=args.license, name=args.name, overwrite=args.overwrite
    )
    print(f"written to {path}")


def push(args: argparse.Namespace) -> None:
    """Send a checkpoint to the Hub."""
    from .. import hub

    print(hub.push(args.folder, args.repo_id, private=args.private, dry_run=args.dry_run))


def recipes(args: argparse.Namespace) -> None:
    """List, show or copy the built-in recipes."""
    from ..configuration import builtin_names, description, read_source

    if args.action == "ls":
        for name in builtin_names():
            print(f"{name:16} {description(name)}")
    elif args.action == "show":
        sys.stdout.write(read_source(args.name))
    else:
        write_text(refuse_existing(args.file, args.overwrite, file=True), read_source(args.name))
        print(f"written to {args.file}")


def env(args: argparse.Namespace) -> None:
    """Versions for a bug report."""
    import platform

    import torch

    from ..evaluation import versions

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    for name, value in {**versions(), "platform": platform.platform(), "gpus": ", ".join(gpus) or "none"}.items():
        print(f"{name:16} {value}")


#: what `make_plan` is told, and what a calibration pass is; None where a flag was not given
_CHOICES = (
    "criterion", "allocation", "temperature", "attention_share", "min_kv_heads", "min_ffn", "keep_layers", "round_to",
)  # fmt: skip
_PASS = ("calibration", "samples", "seq_len", "save_statistics")


def _prune_request(args: argparse.Namespace) -> PruneRequest:
    from ..pipeline import PruneRequest

    if plan := getattr(args, "plan", None):
        _refuse_unused(args, _CHOICES, "a saved plan says what goes")
    if args.statistics and not _windowless(args):
        _refuse_unused(args, _PASS, "saved statistics need no calibration pass")
    if args.save_statistics:
        refuse_existing(args.save_statistics, False, way_out="give --save-statistics another name")
    # the others have the defaults of the request
    names = (*_CHOICES, *_PASS, "ratio", "backbone_ratio", "rates", "compensation", "statistics", "memory", "device")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return PruneRequest(model=args.model, seed=args.seed, plan=plan, **given)


def _refuse_unused(args: argparse.Namespace, names: Iterable[str], reason: str) -> None:
    """Raise [`UsageError`] where one of the flags `names` was given, which would change nothing."""
    for name in names:
        if getattr(args, name) is not None:
            raise UsageError(f"{reason}: leave --{name.replace('_', '-')} out")


def _windowless(args: argparse.Namespace) -> bool:
    """Whether text is read beside saved statistics: by an allocation that measures, where they have no windows."""
    from ..statistics import Statistics

    return args.allocation in ("layer_importance", "search") and Statistics.load(args.statistics).calibration is None
