"""Keep the weights with the lowest held-out loss, including those before the training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..utils import replace_folder, write_json

if TYPE_CHECKING:
    from .sft import RecoveryTrainer

#: file in the folder of the best weights that says when they were evaluated: `step`, `loss`, `perplexity`
_HELD_OUT = "held_out.json"


def kept(folder: Path) -> dict[str, Any] | None:
    """Return step, loss and perplexity of the best weights in `folder`; None if there are none."""
    path = folder / _HELD_OUT
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


class KeepBest(TrainerCallback):
    """Save the weights after every evaluation that improves on all before it.

    Args:
        folder: receives the weights, complete or not at all.
        patience: number of evaluations without improvement after which the training stops; None: never.
    """

    def __init__(self, trainer: RecoveryTrainer, folder: Path, patience: int | None) -> None:
        self.trainer, self.folder, self.patience = trainer, folder, patience
        # equal in all processes: they decide together without reading the folder again
        self.best = kept(folder)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        losses = {entry["step"]: entry for entry in state.log_history if "eval_loss" in entry}
        # a resumed training also evaluates where it resumes
        regular = [step for step in losses if step % args.eval_steps == 0 or step == state.max_steps]
        if state.global_step not in regular:
            return
        loss, perplexity = (losses[state.global_step][name] for name in ("eval_loss", "eval_perplexity"))
        if self.best is None or loss < self.best["loss"] or math.isnan(self.best["loss"]):
            self.best = {"step": state.global_step, "loss": loss, "perplexity": perplexity}
            self._save(self.best)
        elif self.patience is not None and sum(step > self.best["step"] for step in regular) >= self.patience:
            control.should_training_stop = True

    def _save(self, best: dict[str, Any]) -> None:
        scratch = self.folder.with_name(f"{self.folder.name}.new")
        with self.trainer.saving(scratch):
            self.trainer.save_model(str(scratch))
            self.trainer.accelerator.wait_for_everyone()
            if self.trainer.is_world_process_zero():
                self.trainer.finish(scratch)
                write_json(scratch / _HELD_OUT, best)
                replace_folder(scratch, self.folder)
            self.trainer.accelerator.wait_for_everyone()
