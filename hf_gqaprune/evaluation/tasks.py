"""Evaluate a model on lm-eval tasks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """Run lm-eval tasks.

    Args:
        model, tokenizer: a loaded causal LM and its tokenizer.
        tasks: names of lm-eval tasks.
        include_path: folder of task YAML files; only these tasks are then available, and nothing is downloaded.
        limit: examples per task.
        batch_size: requests per forward pass.

    Returns:
        `{task: {metric: value}}`, numbers only; `acc` stands for lm-eval's `acc,none`, other filters stay in the name.

    Raises:
        UsageError: lm-eval is not installed, the folder does not exist, or a task is unknown.
    """
    manager = task_manager(tasks, include_path)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    was_training = model.training
    try:
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        output = simple_evaluate(harness, tasks=list(tasks), task_manager=manager, limit=limit)
    finally:
        model.train(was_training)
    return {
        task: {
            # metrics have keys `metric,filter`; other keys hold sample counts and the alias
            key.removesuffix(",none"): float(value)
            for key, value in values.items()
            if "," in key and isinstance(value, int | float)
        }
        for task, values in output["results"].items()
    }


def task_manager(tasks: Sequence[str], include_path: str | os.PathLike[str] | None = None) -> Any:
    """Return an lm-eval `TaskManager` that has all of `tasks`; raise [`UsageError`] as `evaluate_tasks` does."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError("tasks need lm-eval, which is not installed: pip install lm-eval") from error
    if include_path is not None and not Path(include_path).is_dir():
        raise UsageError(f"no such folder of task files: {include_path}")
    manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    for task in tasks:
        if task not in manager.all_tasks:
            raise _unknown_task(task, manager.all_tasks)
    return manager


def _unknown_task(task: str, known: Sequence[str]) -> UsageError:
    near = get_close_matches(task, known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    # lm-eval has thousands of tasks: too many for one line
    where = f"allowed: {', '.join(known)}" if len(known) <= 20 else "see `lm-eval ls tasks`"
    return UsageError(f"unknown task {task!r}{hint}; {where}")
