"""What each verb does: parsed arguments in, one call, what it says to stdout. Heavy imports stay inside."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, unknown
from ..files import refuse_existing, write_text

if TYPE_CHECKING:
    from ..preparation import PruneRequest


def run(args: argparse.Namespace) -> None:
    """Everything a recipe says."""
    from .. import pipeline
    from ..recipe import Recipe

    recipe = Recipe.load(args.recipe, args.set)
    print(pipeline.run(recipe, resume=args.resume, overwrite=args.overwrite))


def plan(args: argparse.Namespace) -> None:
    """Decide and print; write the plan alone."""
    from .. import pipeline, ranks

    chosen = pipeline.plan_model(_prune_request(args), args.output, overwrite=args.overwrite, resume=args.resume)
    if ranks.index() == 0:
        print(f"{chosen}\n\nwritten to {args.output}")


def prune(args: argparse.Namespace) -> None:
    """Write the smaller checkpoint."""
    from .. import pipeline, ranks

    chosen = pipeline.prune_model(_prune_request(args), args.output, overwrite=args.overwrite, resume=args.resume)
    if ranks.index() == 0:
        print(f"{chosen}\n\nwritten to {args.output}")


def recover(args: argparse.Namespace) -> None:
    """Train and merge under accelerate launch."""
    from ..recipe import assignment
    from ..trainer.presets import Settings
    from ..trainer.recover import launch

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
    from ..trainer.merge import merge as merge_adapter

    print(f"written to {merge_adapter(args.adapter, args.output, base=args.base, overwrite=args.overwrite)}")


def evaluate(args: argparse.Namespace) -> None:
    """Perplexities and tasks of one or several checkpoints."""
    from ..devices import choose, within
    from ..evaluation import evaluate_perplexity, evaluate_tasks, task_manager, window
    from ..text import load_text
    from ..trainer.models import check_weights, load_config, load_to_run, load_tokenizer, local_folder

    device = choose(args.device)
    tasks = args.tasks.split(",") if args.tasks else []
    if not args.data and not tasks:
        raise UsageError("nothing to evaluate: pass --data NAME_OR_FILE or --tasks T")
    texts = [load_text(name, split="test", max_chars=args.max_chars) for name in args.data]
    folders = {name: local_folder(name) for name in args.models}
    for folder in folders.values():
        window(load_config(folder), args.seq_len, args.stride)
        check_weights(folder)
    if tasks:
        task_manager(tasks, args.include_path)
    found: dict[str, dict[str, object]] = {}
    for name, folder in folders.items():
        with within(device, "--device cpu uses no GPU"):
            model, tokenizer = load_to_run(folder, args.device), load_tokenizer(folder)
            results = [
                evaluate_perplexity(
                    model, tokenizer, text, seq_len=args.seq_len, stride=args.stride, drop_tail=args.drop_tail
                )
                for text in texts
            ]
            options: dict[str, Any] = {"include_path": args.include_path, "limit": args.limit}
            measured = evaluate_tasks(model, tokenizer, tasks, **options) if tasks else {}
            del model  # two of them may be too much for a GPU
        found[name] = {"perplexity": [result.to_dict() for result in results], "tasks": measured}
        if not args.json:
            lines = [str(result) for result in results]
            lines += [f"{task} {metric}: {value:.4f}" for task, ms in measured.items() for metric, value in ms.items()]
            print("\n  ".join([name, *lines]), flush=True)
    if args.json:
        print(json.dumps(found, indent=2))


def card(args: argparse.Namespace) -> None:
    """Write the model card."""
    from ..model_cards.card import create_model_card

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
    from ..recipe import builtin_names, description, read_source

    if args.action == "ls":
        for name in builtin_names():
            print(f"{name:16} {description(name)}")
    elif args.action == "show":
        sys.stdout.write(read_source(args.name))
    else:
        write_text(refuse_existing(args.file, args.overwrite), read_source(args.name))
        print(f"written to {args.file}")


def env(args: argparse.Namespace) -> None:
    """Versions for a bug report."""
    import platform

    import torch

    from ..report import versions

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    for name, value in {**versions(), "platform": platform.platform(), "gpus": ", ".join(gpus) or "none"}.items():
        print(f"{name:16} {value}")


def _prune_request(args: argparse.Namespace) -> PruneRequest:
    from ..preparation import PruneRequest

    return PruneRequest(
        model=args.model,
        ratio=args.ratio,
        backbone_ratio=args.backbone_ratio,
        criterion=args.criterion,
        allocation=args.allocation or ("per_layer" if args.rates else "global"),
        temperature=args.temperature,
        attention_share=args.attention_share,
        rates=args.rates,
        min_kv_heads=args.min_kv_heads,
        min_ffn=args.min_ffn,
        keep_layers=args.keep_layers,
        round_to=args.round_to,
        compensation=args.compensation,
        calibration=tuple(args.calibration or ()),
        samples=args.samples,
        seq_len=args.seq_len,
        seed=args.seed,
        statistics=args.statistics,
        save_statistics=args.save_statistics and str(refuse_existing(Path(args.save_statistics), False)),
        plan=getattr(args, "plan", None),
        memory=args.memory,
        device=args.device,
    )
