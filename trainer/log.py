"""A finished training goes in; what was trained on what, and how the loss went, comes out as JSON and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .data import TrainingData
from .request import Request
from .sft import RecoveryTrainer
from .steps import Steps

#: in the recovered checkpoint, beside the log; a model card shows it
CURVE_FILE = "training.png"
LOG_VERSION = 1


def training_log(
    request: Request, data: TrainingData, trainer: RecoveryTrainer, steps: Steps, seconds: float
) -> dict[str, Any]:
    """What was trained on what, and how the loss went; JSON-ready, without local paths."""
    history = trainer.state.log_history
    trained = [
        {"step": entry["step"], "tokens": entry.get("num_input_tokens_seen")}
        | {name: entry[name] for name in ("loss", "cross_entropy", "divergence", "learning_rate") if name in entry}
        for entry in history
        if "loss" in entry
    ]
    # a resumed run measures once more where it starts
    held_out = {
        entry["step"]: {"step": entry["step"], "loss": entry["eval_loss"], "perplexity": entry["eval_perplexity"]}
        for entry in history
        if "eval_loss" in entry
    }
    model = trainer.model
    return {
        "version": LOG_VERSION,
        "teacher": request.config.teacher and Path(request.config.teacher).name,
        "seed": request.seed,
        "settings": {name: value for name, value in request.config.to_dict().items() if name not in ("data", "teacher")},
        "data": data.record(),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "processes": steps.processes,
        "rows_per_step": steps.rows_per_step,
        "steps": trainer.state.global_step,
        "tokens": trainer.state.num_input_tokens_seen,
        "seconds": round(seconds, 3),
        "train": trained,
        "held_out": list(held_out.values()),
    }


def draw(log: Mapping[str, Any], path: Path) -> None:
    """Draw what `training_log` returned as a PNG: cross-entropy of training and held-out rows, and the divergence."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # no pyplot: it keeps figures alive and picks a window system
    figure = Figure(figsize=(8, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    train, held_out = log["train"], log["held_out"]
    steps = [entry["step"] for entry in train]
    axes.plot(steps, [entry.get("cross_entropy", entry["loss"]) for entry in train], color="#9aa5b1", label="training")
    if held_out:
        points = [entry["step"] for entry in held_out]
        axes.plot(points, [entry["loss"] for entry in held_out], "o-", color="#2a7f9e", label="held out")
    if any("divergence" in entry for entry in train):
        right = axes.twinx()
        right.plot(steps, [entry["divergence"] for entry in train], color="#d1495b")
        right.set_ylabel("divergence from the dense model, nats per token", color="#d1495b")
        right.spines["top"].set_visible(False)
    axes.set_xlabel(f"step of {log['rows_per_step']} rows; {log['tokens']:,} tokens in all")
    axes.set_ylabel("cross-entropy, nats per token")
    axes.spines["top"].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    figure.savefig(path)
