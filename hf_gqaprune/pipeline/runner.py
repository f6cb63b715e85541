"""A recipe goes in; a folder with every stage's result comes out: plan, pruned, recovered, report, card.

Each stage writes one file or folder under its final name only when it is complete, so that a run can be resumed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import hub
from ..checkpoint import ModelFolder, seen
from ..configuration import Recipe, RecoverRecipe
from ..data import Text, load_text
from ..errors import UsageError, WorkError
from ..evaluation import (
    PLOT,
    REPORT,
    Measurement,
    Report,
    measure,
    refuse_same_names,
    refuse_seen,
    task_manager,
    window,
    write_report,
)
from ..model_cards import card_command, check_name, create_model_card, derived_name
from ..trainer import launch, load_data, make_request
from ..utils import alone, occupied, refuse_existing, release, within, write_json, write_text
from .prune import PLAN, prune_model, refuse_lost_inputs
from .request import Prepared, PruneRequest, calibrated_on, prepare

PRUNED, RECOVERED, STATE = "pruned", "recovered", "run.json"
#: `run` has other flags
_PRUNE_WAY_OUT = (
    "--set prune.memory=SIZE bounds it, reading the model layer by layer; CUDA_VISIBLE_DEVICES= before the command uses no GPU"
)
_REPORT_WAY_OUT = (
    "what was made is kept for --resume; with it --set evaluate.seq_len=N measures in shorter windows, "
    "CUDA_VISIBLE_DEVICES= before the command uses no GPU"
)


def run(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> str:
    """Everything a recipe says, stage by stage; finished stages are kept by `resume`.

    Returns:
        What a person wants to see at the end: the table, the files that `push` would send, the line that loads them.

    Raises:
        UsageError: before any work, for a recipe that makes no sense or an output that exists.
        WorkError: a stage failed; finished ones stay in the output folder.
    """
    folder = Path(recipe.output)
    _check_output(folder, resume, overwrite)
    if recipe.card.name is not None:
        check_name(recipe.card.name, recipe.model, recipe.card.license)
    request = _request(recipe)
    prepared = prepare(request)
    trained_on = recipe.recover.data if recipe.recover else ()
    refuse_lost_inputs(folder, prepared, (*recipe.evaluate.data, *trained_on))
    texts = _check_evaluation(recipe, prepared)
    trained = _check_recovery(recipe, prepared)
    base = {
        "model": (recipe.model, prepared.folder.stat_hash),
        "seed": recipe.seed,
        "calibration": (recipe.calibration, calibrated_on(prepared), _ids(prepared)),
        "prune": recipe.prune,
    }
    with alone(folder):
        if folder.exists() and not resume:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        stages = _Stages(folder)
        write_text(folder / "recipe.yaml", recipe.without_paths().to_yaml())
        with _telling(prepared.device, _PRUNE_WAY_OUT):
            stages.do(PRUNED, base, lambda again: _prune(request, folder, again))
        final = PRUNED
        if recipe.recover is not None:
            base["recover"] = (recipe.recover, trained)
            arguments = _recovery(recipe, recipe.recover)
            stages.do(RECOVERED, base, lambda again: _recover(folder, arguments, again))
            final = RECOVERED
        base["evaluate"] = (recipe.evaluate, [(text.name, text.split, text.sha256) for text in texts])
        stages.do(REPORT, base, lambda _: _report(recipe, folder, prepared, final, texts))
        return _publish(recipe, folder, final)


def _ids(prepared: Prepared) -> list[list[int]]:
    """The calibration windows: another tokenizer makes others of the same text."""
    return prepared.calibration.ids.tolist() if prepared.calibration else []


@contextmanager
def _telling(device: torch.device, way_out: str) -> Iterator[None]:
    """`devices.within`, also where a stage has told of a full memory already, with flags that `run` does not have."""
    with within(device, way_out):
        try:
            yield
        except WorkError as error:
            if isinstance(error.__cause__, torch.OutOfMemoryError):
                raise error.__cause__ from None
            raise


class _Stages:
    """Which stages were begun and done, from which part of the recipe and from which weights and texts: `run.json`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / STATE
        state = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {"begun": {}, "done": {}}
        self.begun: dict[str, str] = state["begun"]
        self.done: dict[str, str] = state["done"]

    def do(self, name: str, inputs: dict[str, Any], work: Callable[[bool], Any]) -> None:
        """Run `work`, which writes `name`, unless it is there and was made from the same `inputs`.

        `work` is told whether what an interrupted attempt left behind was made from the same inputs, too.
        """
        digest = hashlib.sha256(repr(sorted(inputs.items())).encode()).hexdigest()
        if self.done.get(name) == digest and (self.folder / name).exists():
            print(f"{name}: kept", flush=True)
            return
        print(f"{name}: working", flush=True)
        again = self.begun.get(name) == digest
        self.begun[name] = digest
        self.done.pop(name, None)
        self._write()
        work(again)
        release()
        self.done[name] = digest
        self._write()

    def _write(self) -> None:
        write_json(self.path, {"begun": self.begun, "done": self.done})


def _check_output(folder: Path, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that would be replaced without being asked, or that no run has written."""
    # a recipe.yaml may be the user's own; run.json is written by a run alone
    if occupied(folder) and not (folder / STATE).exists():
        raise UsageError(f"{folder} is not the output of a run: choose another output")
    refuse_existing(folder, overwrite or resume)


def _request(recipe: Recipe) -> PruneRequest:
    return PruneRequest(
        model=recipe.model,
        **asdict(recipe.prune),
        calibration=recipe.calibration.data,
        samples=recipe.calibration.samples,
        seq_len=recipe.calibration.seq_len,
        seed=recipe.seed,
    )


def _check_evaluation(recipe: Recipe, prepared: Prepared) -> tuple[Text, ...]:
    """Load what will be evaluated on, and refuse what calibration has seen."""
    evaluate = recipe.evaluate
    window(prepared.folder.config, evaluate.seq_len, evaluate.stride)
    texts = tuple(load_text(name, split="test") for name in evaluate.data)
    refuse_same_names(texts)
    refuse_seen(texts, [*seen(prepared.folder), *calibrated_on(prepared)])
    if evaluate.tasks:
        task_manager(evaluate.tasks)
    return texts


def _check_recovery(recipe: Recipe, prepared: Prepared) -> list[dict[str, Any]]:
    """Refuse a recovery that could not start; what is pruned has the positions and the vocabulary of the dense model.

    Returns:
        `TrainingData.record()`: the text that will be trained on; nothing of what streams.
    """
    if recipe.recover is None:
        return []
    arguments = _recovery(recipe, recipe.recover)
    request = make_request(prepared.folder, output=Path(recipe.output) / RECOVERED, **arguments)
    if request.settings.streaming:
        return []
    return load_data(
        prepared.folder.tokenizer, request.data, request.settings, seed=request.seed, evaluation=request.evaluation
    ).record()


def _recovery(recipe: Recipe, recover: RecoverRecipe) -> dict[str, Any]:
    """The arguments of `launch` and of `make_request` that a recipe gives."""
    given = {"max_tokens": recover.max_tokens, "seq_len": recover.seq_len}
    return {
        "data": recover.data,
        "preset": recover.preset,
        "seed": recipe.seed,
        "teacher": recipe.model if recover.distill else None,
        "evaluation": recipe.evaluate.data,
        **{name: value for name, value in given.items() if value is not None},
        **recover.settings,
    }


def _prune(request: PruneRequest, folder: Path, again: bool) -> None:
    # what an interrupted run left of another recipe is dropped
    plan = prune_model(request, folder / PRUNED, overwrite=True, resume=again and request.memory is not None)
    plan.save(folder / PLAN)
    print(plan, flush=True)


def _recover(folder: Path, arguments: dict[str, Any], again: bool) -> None:
    launch(folder / PRUNED, output=folder / RECOVERED, overwrite=True, resume=again, **arguments)


def _report(recipe: Recipe, folder: Path, prepared: Prepared, final: str, texts: tuple[Text, ...]) -> None:
    evaluate = recipe.evaluate
    stages = {"dense": prepared.folder, "pruned": ModelFolder(folder / PRUNED)}
    if final == RECOVERED:
        stages["recovered"] = ModelFolder(folder / RECOVERED)
    what = Measurement(
        texts=texts,
        seq_len=evaluate.seq_len,
        stride=evaluate.stride,
        drop_tail=evaluate.drop_tail,
        max_chars=evaluate.max_chars,
        tasks=evaluate.tasks,
        device=prepared.request.device,
    )
    measured = [found for _, found in measure(stages, what, _REPORT_WAY_OUT)]
    write_report(recipe.without_paths().model, stages, measured, folder)


def _publish(recipe: Recipe, folder: Path, final: str) -> str:
    """Complete the folder that `push` would send, and say what there is to say."""
    for name in (REPORT, PLOT, "recipe.yaml"):
        shutil.copyfile(folder / name, folder / final / name)
    name = recipe.card.name or derived_name(recipe.without_paths().model)
    create_model_card(
        folder / final, base_model=recipe.model, license=recipe.card.license, name=name, overwrite=True
    )
    problems = hub.verify(folder / final)
    if problems:
        raise WorkError(f"{folder / final} is not a checkpoint that can be pushed: {'; '.join(problems)}")
    listing = str(hub.bundle(folder / final))
    load = (
        f"import hf_gqaprune; from transformers import AutoModelForCausalLM; "
        f'model = AutoModelForCausalLM.from_pretrained("{folder / final}")'
    )
    table = Report.load(folder / REPORT).table()
    # a card that names no repository is written anew for one
    renamed = f"`{card_command(folder / final, recipe.model, 'ORG/NAME', recipe.card.license)}`, then "
    first, target = ("", name) if "/" in name else (renamed, "ORG/NAME")
    return f"\n{first}`gqaprune push {folder / final} {target}` would send:\n{listing}\n\n{table}\n\n{load}"
