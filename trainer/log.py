"""Record a finished training as JSON and plot its loss curve."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .data import TrainingData
from .request import Request
from .sft import RecoveryTrainer
from .steps import Steps

logger = logging.getLogger(__name__)
#: loss curve in the recovered checkpoint, shown by its model card
CURVE_FILE = "training.png"
LOG_VERSION = 1


def training_log(
    request: Request,
    data: TrainingData,
    trainer: RecoveryTrainer,
    steps: Steps,
    seconds: float,
    kept: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return settings, data and losses of a training in JSON-ready form, without local paths.

    Args:
        kept: step, loss and perplexity of the weights that were kept; None if they are the last ones.
    """
    if kept is not None and kept["step"] == 0:
        logger.warning(
            "no evaluation improved on the held-out loss before the training (%.4f nats): the weights are kept as they were; "
            "lower learning_rate, now %g, or train on more text",
            kept["loss"],
            request.config.learning_rate,
        )
    history = trainer.state.log_history
    trained = [
        {"step": entry["step"], "tokens": entry.get("num_input_tokens_seen")}
        | {name: entry[name] for name in ("loss", "cross_entropy", "divergence", "learning_rate") if name in entry}
        for entry in history
        if "loss" in entry
    ]
    # a resumed run evaluates again where it starts
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
        "threads": torch.get_num_threads(),
        "rows_per_step": steps.rows_per_step,
        "steps": trainer.state.global_step,
        "tokens": trainer.state.num_input_tokens_seen,
        "seconds": round(seconds, 3),
        "train": trained,
        "held_out": list(held_out.values()),
        "kept": kept,
    }


def plot_curve(log: Mapping[str, Any], path: Path) -> None:
    """Plot a training log as a PNG: cross-entropy of training and held-out rows, and the divergence from the teacher."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # without pyplot, which keeps figures alive and chooses a window system
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
