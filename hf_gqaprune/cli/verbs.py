"""Run each verb: parsed arguments to one call, its result to stdout. Heavy imports stay inside."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from .. import utils
from ..configuration import (
    CalibrationConfig,
    CardConfig,
    EvaluationConfig,
    PruneRequest,
    PruningConfig,
    Recipe,
    RecoveryConfig,
    Settings,
    builtin_names,
    description,
    read_source,
)
from ..errors import UsageError
from .arguments import HOW
from .flags import flag_of, given


def run(args: argparse.Namespace) -> None:
    """Run everything a recipe says."""
    recipe = Recipe.load(args.recipe, args.set)
    if not args.resume and args.recipe not in builtin_names():
        utils.refuse_overwriting_inputs(recipe.output, [args.recipe])
    from ..pipeline import run as run_recipe

    notify = functools.partial(print, flush=True)
    print(run_recipe(recipe, resume=args.resume, overwrite=args.overwrite, notify=notify))


def plan(args: argparse.Namespace) -> None:
    """Decide and print; write the plan alone."""
    request = _prune_request(args)
    from ..exporters import verdicts
    from ..pipeline import plan_model
    from ..utils import distributed

    chosen = plan_model(request, args.output, overwrite=args.overwrite, resume=args.resume)
    if distributed.index() == 0:
        served = "\n".join(f"  {verdict}" for verdict in verdicts(chosen.target))
        print(f"{chosen}\n\nserved by\n{served}\n\nwritten to {args.output}")


def prune(args: argparse.Namespace) -> None:
    """Write the smaller checkpoint."""
    request = _prune_request(args)
    from ..checkpoint import format_sources, read_identity
    from ..pipeline import prune_model
    from ..utils import distributed

    chosen = prune_model(request, args.output, overwrite=args.overwrite, resume=args.resume)
    if distributed.index() == 0:
        texts = format_sources((read_identity(Path(args.output)) or {}).get("calibration", ()))
        print(f"{chosen}\n\nwritten to {args.output}" + (f", calibrated on {texts}" if texts else ""))


def recover(args: argparse.Namespace) -> None:
    """Train and merge under accelerate launch."""
    settings = given(args, RecoveryConfig)
    config = RecoveryConfig.from_preset(**settings)
    from ..trainer import launch

    launch(
        args.folder, config, args.output,
        seed=getattr(args, "seed", 0), evaluation=args.evaluation, overwrite=args.overwrite, resume=args.resume,
        accelerate=args.accelerate,
    )  # fmt: skip
    print(f"written to {args.output}")


def merge(args: argparse.Namespace) -> None:
    """Merge an adapter."""
    from ..trainer import merge as merge_adapter

    print(f"written to {merge_adapter(args.adapter, args.output, base=args.base, overwrite=args.overwrite)}")


def evaluate(args: argparse.Namespace) -> None:
    """Measure perplexities and tasks of one or several checkpoints, and write the report that compares them."""
    config = EvaluationConfig(**{"data": (), **given(args, EvaluationConfig)})
    if not config.data and not config.tasks:
        raise UsageError("nothing to evaluate: pass --data NAME_OR_FILE or --tasks T")
    if args.overwrite and not args.report:
        raise UsageError("--overwrite is for the report: add --report, or leave it out")
    from ..checkpoint import resolve_model
    from ..data import load_text
    from ..evaluation import REPORT, evaluate_checkpoints, report_stages, task_manager, write_report
    from ..utils import select_device

    select_device(config.device)
    texts = tuple(load_text(name, split="test") for name in config.data)
    models = {name: resolve_model(name) for name in args.models}
    stages = report_stages(models, texts, args.overwrite) if args.report else {}
    if config.tasks:
        task_manager(config.tasks, config.include_path)
    results = {}
    for name, result in evaluate_checkpoints(models, texts, config, "--device cpu uses no GPU"):
        results[name] = result
        if not args.json:
            lines = [str(perplexity) for perplexity in result.perplexity]
            lines += [
                f"{task} {metric}: {value:.4f}"
                for task, metrics in (result.tasks or {}).items()
                for metric, value in metrics.items()
            ]
            print("\n  ".join([name, *lines]), flush=True)
    if args.json:
        plain = {
            name: {"perplexity": [each.to_dict() for each in result.perplexity], "tasks": result.tasks or {}}
            for name, result in results.items()
        }
        print(json.dumps(plain, indent=2))
    if stages:
        dense, last = args.models[0], models[args.models[-1]].path
        # the name, without the local path
        model = Path(dense).resolve().name if Path(dense).exists() else dense
        report = write_report(model, stages, results.values(), last)
        if not args.json:
            print(f"\n{report.table()}\n\nwritten to {last / REPORT}")


def card(args: argparse.Namespace) -> None:
    """Write the model card."""
    config = CardConfig(**given(args, CardConfig))
    from ..model_cards import create_model_card

    path = create_model_card(
        args.folder, base_model=args.base_model, license=config.license, name=config.name, overwrite=args.overwrite
    )
    print(f"written to {path}")


def push(args: argparse.Namespace) -> None:
    """Send a checkpoint to the Hub."""
    from .. import hub

    print(hub.push(args.folder, args.repo_id, private=args.private, dry_run=args.dry_run))


def export(args: argparse.Namespace) -> None:
    """Write what another engine loads, and say what was decided."""
    from ..exporters import export as export_checkpoint

    options = {name: getattr(args, name) for name in ("to", "dtype", "tokenizer_from", "pad", "overwrite")}
    exported = export_checkpoint(args.model, args.output, **options)
    print("\n".join([*exported.notes, f"written to {exported.path}"]))


def recipes(args: argparse.Namespace) -> None:
    """List, show or copy the built-in recipes."""
    if args.action == "ls":
        for name in builtin_names():
            print(f"{name:16} {description(name)}")
    elif args.action == "show":
        sys.stdout.write(read_source(args.name))
    else:
        utils.write_text(utils.refuse_existing(args.file, args.overwrite, file=True), read_source(args.name))
        print(f"written to {args.file}")


def env(args: argparse.Namespace) -> None:
    """Print the versions that a bug report needs."""
    import platform

    import torch

    from ..evaluation import versions

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    for name, value in {**versions(), "platform": platform.platform(), "gpus": ", ".join(gpus) or "none"}.items():
        print(f"{name:16} {value}")


def _prune_request(args: argparse.Namespace) -> PruneRequest:
    request = given(args, PruneRequest)
    pruning, calibration = given(args, PruningConfig), given(args, CalibrationConfig)
    if request.get("plan"):
        chosen = {name: value for name, value in pruning.items() if name not in ("compensation", *HOW)}
        _refuse_unused(chosen, PruningConfig, "a saved plan says what is removed")
    if request.get("statistics") and not _windowless(request, pruning):
        _refuse_unused(calibration, CalibrationConfig, "saved statistics need no calibration pass")
        if "save_statistics" in request:
            raise UsageError("saved statistics need no calibration pass: leave --save-statistics out")
    if save := request.get("save_statistics"):
        utils.refuse_existing(save, False, hint="give --save-statistics another name")
    return PruneRequest(
        args.model,
        PruningConfig(**pruning),
        CalibrationConfig(**calibration),
        **{name: value for name, value in request.items() if name != "model"},
    )


def _refuse_unused(values: dict[str, Any], section: type[Settings], reason: str) -> None:
    """Raise [`UsageError`] for a flag that would change nothing."""
    for spec in fields(section):
        if spec.name in values:
            raise UsageError(f"{reason}: leave {flag_of(spec)} out")


def _windowless(request: dict[str, Any], pruning: dict[str, Any]) -> bool:
    """Tell whether text is read beside saved statistics: by an allocation that measures, if they hold no windows."""
    from ..statistics import Statistics

    measures = pruning.get("allocation") in ("layer_importance", "search")
    return measures and Statistics.load(request["statistics"]).calibration is None
