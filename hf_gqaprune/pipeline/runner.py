"""Run a recipe: plan, pruned, recovered, report and card, one stage after the other.

Each stage writes one file or folder under its final name only when it is complete, so that a run can be resumed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import hub
from ..checkpoint import resolve_model, texts_used
from ..configuration import DENSE, PruneRequest, Recipe, RecoveryConfig
from ..data import Text, load_text
from ..errors import UsageError, WorkError
from ..evaluation import (
    PLOT,
    REPORT,
    Report,
    check_unique_names,
    check_unseen,
    evaluate_checkpoints,
    task_manager,
    window,
    write_report,
)
from ..model_cards import card_command, check_name, create_model_card, derived_name
from ..plan import PruningPlan
from ..trainer import ADAPTER, launch, load_data, make_request, record_base
from ..utils import (
    empty_gpu_cache,
    exclusive_lock,
    is_occupied,
    memory_limit,
    refuse_existing,
    remove_working_folder,
    replace_folder,
    working_folder,
    write_json,
    write_text,
)
from .prune import PLAN, prune_model, refuse_lost_inputs
from .request import Prepared, calibrated_on, prepare
from .stages import timed

logger = logging.getLogger(__name__)

PRUNED, RECOVERED, STATE = "pruned", "recovered", "run.json"
#: `run` has no flags of its own for these
_PRUNE_HINT = (
    "--set prune.memory=SIZE bounds it, reading the model layer by layer; CUDA_VISIBLE_DEVICES= before the command uses no GPU"
)
_REPORT_HINT = (
    "finished stages are kept for --resume; with it --set evaluate.seq_len=N measures in shorter windows, "
    "CUDA_VISIBLE_DEVICES= before the command uses no GPU"
)


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves.

    Attributes:
        folder: the final checkpoint, complete with card, report and recipe.
        plan: what was removed.
        report: perplexities and tasks of every stage, on the same tokens.
        bundle: what `push` would send.
        push: the commands that publish it, in order.
    """

    folder: Path
    plan: PruningPlan
    report: Report
    bundle: hub.Bundle
    push: tuple[str, ...]

    @property
    def load_line(self) -> str:
        """Python that loads the final checkpoint."""
        return (
            f"import hf_gqaprune; from transformers import AutoModelForCausalLM; "
            f'model = AutoModelForCausalLM.from_pretrained("{self.folder}")'
        )

    def __str__(self) -> str:
        commands = ", then ".join(f"`{command}`" for command in self.push)
        return f"\n{commands} would send:\n{self.bundle}\n\n{self.report.table()}\n\n{self.load_line}"


def run(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, notify: Callable[[str], object] = logger.info
) -> RunResult:
    """Run every stage of a recipe; `resume` keeps finished stages whose inputs are unchanged.

    Args:
        notify: receives one line as each stage begins, and the plan.

    Raises:
        UsageError: before any work, for a recipe that makes no sense or an output that exists.
        WorkError: a stage failed; finished ones stay in the output folder.
    """
    folder = Path(recipe.output)
    _check_output(folder, resume, overwrite)
    if recipe.card.name is not None:
        check_name(recipe.card.name, recipe.model, recipe.card.license)
    request = PruneRequest(recipe.model, recipe.prune, recipe.calibration, recipe.seed)
    prepared = prepare(request)
    trained_on = recipe.recover.data if recipe.recover else ()
    refuse_lost_inputs(folder, prepared, (*recipe.evaluate.data, *trained_on))
    texts = _check_evaluation(recipe, prepared)
    recovery = recipe.recover and _recovery(recipe, recipe.recover)
    trained = _check_recovery(recipe, recovery, prepared)
    base: dict[str, Any] = {
        "model": (recipe.model, prepared.source.stat_hash),
        "seed": recipe.seed,
        "calibration": (recipe.calibration, calibrated_on(prepared), _ids(prepared)),
        "prune": recipe.prune,
    }
    with exclusive_lock(folder):
        # an earlier result stays until the new one is complete
        unfinished = working_folder(folder)
        if not resume:
            remove_working_folder(unfinished)
        replacing = unfinished.exists() or (is_occupied(folder) and not resume)
        work = unfinished if replacing else folder
        work.mkdir(parents=True, exist_ok=True)
        stages = _Stages(work, notify)
        write_text(work / "recipe.yaml", recipe.without_paths().to_yaml())
        with _hint_for_runs(prepared.device, _PRUNE_HINT):
            stages.do(PRUNED, base, lambda again: _prune(prepared, work, again, notify))
        final = PRUNED
        if recovery is not None:
            base["recover"] = (recovery, trained)
            stages.do(RECOVERED, base, lambda again: _recover(recipe, recovery, work, again))
            final = RECOVERED
        base["evaluate"] = (recipe.evaluate, [(text.name, text.split, text.sha256) for text in texts])
        stages.do(REPORT, base, lambda _: _report(recipe, work, prepared, final, texts))
        _complete(recipe, work, final)
        if replacing:
            replace_folder(work, folder)
            if (adapter := folder / RECOVERED / ADAPTER).is_dir():
                record_base(adapter, str((folder / PRUNED).resolve()))
        return _result(recipe, folder, final)


def _ids(prepared: Prepared) -> list[list[int]]:
    """List the calibration windows: another tokenizer cuts others from the same text."""
    return prepared.calibration.ids.tolist() if prepared.calibration else []


@contextmanager
def _hint_for_runs(device: torch.device, hint: str) -> Iterator[None]:
    """Name what a recipe can change where a GPU is full, also where a stage has named flags that `run` does not have."""
    with memory_limit(device, hint):
        try:
            yield
        except WorkError as error:
            if isinstance(error.__cause__, torch.OutOfMemoryError):
                raise error.__cause__ from None
            raise


class _Stages:
    """Keep in `run.json` which stages were begun and done, from which inputs, and how many seconds they took."""

    def __init__(self, folder: Path, notify: Callable[[str], object]) -> None:
        self.folder, self.notify = folder, notify
        self.path = folder / STATE
        state = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {"begun": {}, "done": {}}
        self.begun: dict[str, str] = state["begun"]
        self.done: dict[str, str] = state["done"]
        self.seconds: dict[str, float] = state.get("seconds", {})

    def do(self, name: str, inputs: dict[str, Any], work: Callable[[bool], Any]) -> None:
        """Run `work`, which writes `name`, unless it exists and was made from the same `inputs`.

        `work` receives whether an interrupted attempt left parts that were made from the same inputs.
        """
        digest = hashlib.sha256(repr(sorted(inputs.items())).encode()).hexdigest()
        if self.done.get(name) == digest and (self.folder / name).exists():
            self.notify(f"{name}: kept")
            return
        self.notify(f"{name}: working")
        again = self.begun.get(name) == digest
        self.begun[name] = digest
        self.done.pop(name, None)
        self._write()
        with timed(name, self.seconds):
            work(again)
        empty_gpu_cache()
        self.done[name] = digest
        self._write()

    def _write(self) -> None:
        write_json(self.path, {"begun": self.begun, "done": self.done, "seconds": self.seconds})


def _check_output(folder: Path, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that would be replaced without being asked, or that no run has written."""
    # a recipe.yaml may be the user's own; run.json is written by a run alone
    if is_occupied(folder) and not (folder / STATE).exists():
        raise UsageError(f"{folder} is not the output of a run: choose another output")
    refuse_existing(folder, overwrite or resume)


def _check_evaluation(recipe: Recipe, prepared: Prepared) -> tuple[Text, ...]:
    """Load the evaluation texts, and refuse those that the model was calibrated on."""
    evaluate = recipe.evaluate
    window(prepared.source.config, evaluate.seq_len, evaluate.stride)
    texts = tuple(load_text(name, split="test") for name in evaluate.data)
    check_unique_names(texts)
    check_unseen(texts, [*texts_used(prepared.source.path), *calibrated_on(prepared)])
    if evaluate.tasks:
        task_manager(evaluate.tasks, evaluate.include_path)
    return texts


def _recovery(recipe: Recipe, config: RecoveryConfig) -> RecoveryConfig:
    """Name the recipe's own model where its recovery distils from it."""
    return replace(config, teacher=recipe.model) if config.teacher == DENSE else config


def _check_recovery(recipe: Recipe, config: RecoveryConfig | None, prepared: Prepared) -> list[dict[str, Any]]:
    """Refuse a recovery that could not start; the pruned model has the positions and vocabulary of the dense one.

    Returns:
        `TrainingData.record()`: the text that will be trained on; nothing of a stream.
    """
    if config is None:
        return []
    request = make_request(
        prepared.source, config, Path(recipe.output) / RECOVERED, seed=recipe.seed, evaluation=recipe.evaluate.data
    )
    if request.config.streaming:
        return []
    source = prepared.source
    return load_data(
        source.tokenizer, request.config, vocabulary=source.config.vocab_size, seed=request.seed, evaluation=request.evaluation
    ).record()


def _prune(prepared: Prepared, folder: Path, again: bool, notify: Callable[[str], object]) -> None:
    # what an interrupted run left of another recipe is dropped
    resume = again and prepared.request.pruning.memory is not None
    plan = prune_model(prepared.request, folder / PRUNED, overwrite=True, resume=resume, prepared=prepared)
    plan.save(folder / PLAN)
    notify(str(plan))


def _recover(recipe: Recipe, config: RecoveryConfig, folder: Path, again: bool) -> None:
    launch(
        folder / PRUNED, config, folder / RECOVERED,
        seed=recipe.seed, evaluation=recipe.evaluate.data, overwrite=True, resume=again,
    )  # fmt: skip


def _report(recipe: Recipe, folder: Path, prepared: Prepared, final: str, texts: tuple[Text, ...]) -> None:
    stages = {"dense": prepared.source, "pruned": resolve_model(folder / PRUNED)}
    if final == RECOVERED:
        stages["recovered"] = resolve_model(folder / RECOVERED)
    device = recipe.evaluate.device or recipe.prune.device
    config = replace(recipe.evaluate, device=device)
    results = [result for _, result in evaluate_checkpoints(stages, texts, config, _REPORT_HINT)]
    write_report(recipe.without_paths().model, stages, results, folder)


def _complete(recipe: Recipe, folder: Path, final: str) -> None:
    """Add report, recipe and card to the folder that `push` would send."""
    target = folder / final
    for name in (REPORT, PLOT, "recipe.yaml"):
        shutil.copyfile(folder / name, target / name)
    create_model_card(
        target, base_model=recipe.model, license=recipe.card.license, name=_card_name(recipe), overwrite=True
    )
    if problems := hub.verify(target):
        raise WorkError(f"{target} is not a checkpoint that can be pushed: {'; '.join(problems)}")


def _card_name(recipe: Recipe) -> str:
    return recipe.card.name or derived_name(recipe.without_paths().model)


def _result(recipe: Recipe, folder: Path, final: str) -> RunResult:
    target, name = folder / final, _card_name(recipe)
    # a card that names no repository is written anew for one
    named = "/" in name
    rename = () if named else (card_command(target, recipe.model, "ORG/NAME", recipe.card.license),)
    push = (*rename, f"gqaprune push {target} {name if named else 'ORG/NAME'}")
    return RunResult(target, PruningPlan.load(folder / PLAN), Report.load(folder / REPORT), hub.bundle(target), push)
