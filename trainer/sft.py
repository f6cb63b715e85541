"""Train with trl's `SFTTrainer`, a teacher, a stop at the first non-finite loss, and sealed checkpoints."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTTrainer

from ..errors import WorkError
from ..models import cross_entropy
from . import checkpoints
from .distill import MODEL_INPUTS, Teacher, losses, scored
from .teacher_cache import TeacherCache


class RecoveryTrainer(SFTTrainer):
    """Train on rows of `data.load_data`.

    Args:
        weight: weight of the divergence from the teacher; cross-entropy has `1 - weight`.
        finish: writes the remaining files of a checkpoint on the main process, before the manifest.

    Attributes:
        teacher: model or cache to distil from; None: the loss is cross-entropy alone.
    """

    def __init__(self, *args: Any, weight: float, finish: Callable[[Path], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_FiniteGradients(self))
        self.finish = finish
        self.teacher: Teacher | TeacherCache | None = None
        self.weight = weight
        self._parts: dict[str, float] = defaultdict(float)
        self._batch: dict[str, Any] = {}
        # evaluation sums nats and tokens: its batches may hold different numbers of tokens
        self._held_out = torch.zeros(2, dtype=torch.float64)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not model.training:
            return self._held_out_loss(model, inputs)
        if self.teacher is None:
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        else:
            loss = self._distilled(model, inputs, self.teacher, num_items_in_batch)
        self._batch = inputs
        if not torch.isfinite(loss):
            raise self.not_finite_error(f"loss is {float(loss.detach())}")
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        self._held_out.zero_()
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "eval_loss" in logs:
            nats, tokens = self._held_out.tolist()
            mean = nats / tokens
            logs["eval_loss"], logs["eval_perplexity"] = mean, math.exp(min(mean, 700.0))
        elif self._parts["steps"]:
            logs |= self._mean_parts()
            self._parts.clear()
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no card: a checkpoint of an unfinished training is not published."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with self.saving(folder):
            super()._save_checkpoint(model, trial)
            # the manifest names the files of all processes
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                self.finish(folder)
                checkpoints.seal(folder)

    @contextmanager
    def saving(self, folder: Path) -> Iterator[None]:
        """Raise [`WorkError`], naming the last complete checkpoint, if the block cannot write `folder`."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            kept = checkpoints.latest(folder.parent)
            raise WorkError(
                f"{folder} could not be written ({error}; {checkpoints.free_space(folder.parent)})"
                + (f"; {kept} is kept: pass --resume to continue" if kept else "")
            ) from error

    def _distilled(
        self, model: Any, inputs: dict[str, Any], teacher: Teacher | TeacherCache, num_items: Any
    ) -> torch.Tensor:
        labels = inputs["labels"]
        mask = scored(labels)
        targets = teacher.targets(inputs, mask)
        given = {name: inputs[name] for name in MODEL_INPUTS if name in inputs}
        logits = model(**given, use_cache=False).logits[:, :-1][mask]  # (n, vocabulary)
        entropy, divergent = losses(logits, labels[:, 1:][mask], targets, teacher.temperature)
        count = mask.sum() if num_items is None else num_items
        # as in SFTTrainer: the count covers all processes, whose gradients are averaged
        scale = self.accelerator.num_processes if num_items is not None and self._averages_tokens() else 1
        scale = scale / torch.as_tensor(count, device=logits.device).clamp(min=1)
        steps = 1 / self.current_gradient_accumulation_steps
        self._parts["cross_entropy"] += float(entropy.detach() / mask.sum().clamp(min=1)) * steps
        self._parts["divergence"] += float(divergent.detach() / mask.sum().clamp(min=1)) * steps
        self._parts["steps"] += steps
        return ((1 - self.weight) * entropy + self.weight * divergent) * scale

    def _mean_parts(self) -> dict[str, float]:
        """Average both parts of the loss over the steps since the last log entry and over all processes."""
        names = ("cross_entropy", "divergence")
        means = [self._parts[name] / self._parts["steps"] for name in names]
        if self.accelerator.num_processes > 1:
            own = torch.tensor([means], dtype=torch.float64, device=self.accelerator.device)
            means = self.accelerator.gather(own).mean(0).tolist()
        return dict(zip(names, means, strict=True))

    @torch.no_grad()
    def _held_out_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        given = {name: inputs[name] for name in MODEL_INPUTS if name in inputs}
        labels = inputs["labels"]
        mask = scored(labels)
        logits = model(**given, use_cache=False).logits[:, :-1][mask]
        nats = torch.zeros_like(mask, dtype=torch.float32)
        nats[mask] = cross_entropy(logits, labels[:, 1:][mask])
        rows = torch.stack([nats.sum(1), mask.sum(1).float()], dim=1)  # (rows, 2)
        # leaves out the rows that pad the last batch of several processes
        self._held_out += self.accelerator.gather_for_metrics(rows).double().sum(0).cpu()
        return nats.sum() / mask.sum().clamp(min=1)

    def _averages_tokens(self) -> bool:
        return bool(self.args.average_tokens_across_devices)

    def not_finite_error(self, what: str) -> WorkError:
        """Return the error that ends a training in which `what` happened, with step, batch and next step."""
        ids = self._batch["input_ids"]
        start = self.processing_class.decode(ids[0][:24], skip_special_tokens=True)
        kept = checkpoints.latest(Path(self.args.output_dir))
        return WorkError(
            f"the {what} at step {self.state.global_step + 1}, in a batch of {len(ids)} rows whose first one "
            f"begins {start!r}: lower learning_rate ({self.args.learning_rate})"
            + (f"; {kept.name} is kept" if kept else "")
        )


class _FiniteGradients(TrainerCallback):
    """Stop before a non-finite gradient reaches the weights: the loss itself may be finite."""

    def __init__(self, trainer: RecoveryTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not torch.isfinite(norm):
            raise self.trainer.not_finite_error("gradient is not finite")
