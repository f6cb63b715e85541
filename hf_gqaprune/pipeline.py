"""A recipe goes in; a folder with every stage's result comes out: plan, pruned, recovered, report, card.

Each stage writes one file or folder under its final name only when it is complete, so that a run can be resumed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import identity, ranks
from .devices import release, within
from .errors import UsageError, WorkError
from .files import new_folder, refuse_existing, write_json, write_text
from .preparation import Prepared, PruneRequest, prepare
from .recipe import Recipe, RecoverRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .plan import PruningPlan
    from .statistics import Statistics

PLAN, PRUNED, RECOVERED, REPORT, PLOT, STATE = (
    "plan.json", "pruned", "recovered", "report.json", "report.png", "run.json",
)  # fmt: skip
_WAY_OUT = "--memory SIZE reads the model layer by layer, --device cpu uses no GPU"


def decide(prepared: Prepared, model: PreTrainedModel) -> tuple[PruningPlan, Statistics]:
    """Measure what has not been measured yet, and choose the plan that has not been given."""
    from .layer_importance import measure
    from .measurement import collect_statistics
    from .planner import make_plan

    request = prepared.request
    statistics = prepared.statistics
    if statistics is None:
        statistics = collect_statistics(
            model,
            prepared.calibration,
            criterion=prepared.measured,
            moments=prepared.calibration is not None,
            seed=request.seed,
        )
        if request.save_statistics and ranks.index() == 0:
            statistics.save(request.save_statistics)
    if prepared.plan is not None:
        return prepared.plan, statistics
    windows, how = prepared.calibration or statistics.calibration, request.allocation
    scores = measure(model, windows) if windows and how == "layer_importance" else None
    looked_at = model if how in ("search", "query_heads") else None
    return make_plan(statistics, model=looked_at, layer_scores=scores, **request.demand()), statistics


def plan_model(
    request: PruneRequest, output: str | Path, *, overwrite: bool = False, resume: bool = False
) -> PruningPlan:
    """The dry run: decide, write the plan alone. `random` reads the config alone.

    With `request.memory` the model is measured layer by layer, which may be resumed: see `bounded`.
    """
    from .bounded import measured
    from .planner import load_for_planning, make_plan

    target = refuse_existing(output, overwrite)
    if resume and not request.memory:
        raise UsageError("only a plan with --memory can be resumed: leave --resume out")
    prepared = prepare(request, planning_only=True)
    weights = prepared.criterion != "random" or request.allocation in ("layer_importance", "search")
    if request.memory and weights:
        with measured(prepared, target, overwrite=overwrite, resume=resume) as statistics:
            plan = make_plan(statistics, **request.demand())
            plan.save(target)
        return plan
    model = load_for_planning(prepared.folder, weights=weights)
    with within(prepared.device, _WAY_OUT):
        plan = decide(prepared, model.to(prepared.device) if weights else model)[0]
    if ranks.index() == 0:
        plan.save(target)
    return plan


def prune_model(
    request: PruneRequest, output: str | Path, *, overwrite: bool = False, resume: bool = False
) -> PruningPlan:
    """Decide, prune, and write the checkpoint with tokenizer, generation config, plan and licence files.

    A saved plan without compensation is replayed shard by shard; with `request.memory` everything goes layer by layer.
    Both may be resumed: see `prune_checkpoint` and `bounded`.

    Returns:
        The plan that was applied to `request.model`. The checkpoint's own, in `prune_plan.json`, begins at the dense
        model where `request.model` was pruned before; that one's hash is in `gqaprune.json`.
    """
    from .bounded import prune_bounded
    from .plan import PruningPlan
    from .surgery import prune
    from .trainer.merge import write_checkpoint
    from .trainer.models import load_model

    refuse_existing(output, overwrite)
    if resume and not request.streamed:
        raise UsageError(
            "only what goes layer by layer can be resumed, --memory SIZE or a saved plan without compensation: "
            "leave --resume out"
        )
    prepared = prepare(request)
    if request.streamed:
        return prune_bounded(prepared, output, overwrite=overwrite, resume=resume)
    with within(prepared.device, _WAY_OUT):
        model = load_model(prepared.folder, device=prepared.device)
        plan, statistics = decide(prepared, model)
        pruned = prune(model, plan, statistics, compensation=request.fitting, inplace=True)
    if ranks.index() == 0:
        base = identity.fingerprint(prepared.folder)
        with new_folder(output, overwrite) as scratch:
            whole = PruningPlan.from_dict(pruned.prune_plan)
            write_checkpoint(pruned, prepared.folder, scratch, plan_hash=whole.hash(), base_fingerprint=base)
    ranks.wait()
    return plan


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
    request = _request(recipe)
    prepared = prepare(request)
    _check_evaluation(recipe, prepared)
    _check_recovery(recipe, prepared)
    if folder.exists() and not resume:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stages = _Stages(folder)
    write_text(folder / "recipe.yaml", recipe.without_paths().to_yaml())
    base = {"model": recipe.model, "seed": recipe.seed, "calibration": recipe.calibration, "prune": recipe.prune}
    stages.do(PRUNED, base, lambda again: _prune(request, folder, again))
    final = PRUNED
    if recipe.recover is not None:
        base["recover"] = recipe.recover
        arguments = _recovery(recipe, recipe.recover)
        stages.do(RECOVERED, base, lambda again: _recover(folder, arguments, again))
        final = RECOVERED
    base["evaluate"] = recipe.evaluate
    stages.do(REPORT, base, lambda _: _report(recipe, folder, prepared, final))
    return _publish(recipe, folder, final)


class _Stages:
    """Which stages were begun and done, and from which part of the recipe: `run.json`."""

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
    refuse_existing(folder, overwrite or resume)
    # a recipe.yaml may be the user's own; run.json is written by a run alone
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / STATE).exists()):
        raise UsageError(f"{folder} is not the output of a run: choose another output")


def _request(recipe: Recipe) -> PruneRequest:
    return PruneRequest(
        model=recipe.model,
        **asdict(recipe.prune),
        calibration=recipe.calibration.data,
        samples=recipe.calibration.samples,
        seq_len=recipe.calibration.seq_len,
        seed=recipe.seed,
    )


def _check_evaluation(recipe: Recipe, prepared: Prepared) -> None:
    """Load what will be evaluated on, and refuse what calibration has seen."""
    from .evaluation import task_manager, window
    from .report import refuse_overlap
    from .text import load_text
    from .trainer.models import load_config

    evaluate = recipe.evaluate
    window(load_config(prepared.folder), evaluate.seq_len, evaluate.stride)
    texts = [load_text(name, split="test") for name in evaluate.data]
    names = [text.name for text in texts]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two evaluation texts are called {name!r}, and a report has one of a name: rename a file")
    used = prepared.calibration.record() if prepared.calibration else []
    refuse_overlap(used, [{"name": t.name, "split": t.split, "sha256": t.sha256} for t in texts])
    if evaluate.tasks:
        task_manager(evaluate.tasks)


def _check_recovery(recipe: Recipe, prepared: Prepared) -> None:
    """Refuse a recovery that could not start; what is pruned has the positions and the vocabulary of the dense model."""
    from .trainer.data import load_data
    from .trainer.models import load_tokenizer
    from .trainer.request import make_request

    if recipe.recover is None:
        return
    arguments = _recovery(recipe, recipe.recover)
    request = make_request(prepared.folder, output=Path(recipe.output) / RECOVERED, **arguments)
    if not request.settings.streaming:
        load_data(
            load_tokenizer(prepared.folder), request.data, request.settings, seed=request.seed, evaluation=request.evaluation
        )


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
    from .trainer.recover import launch

    launch(folder / PRUNED, output=folder / RECOVERED, overwrite=True, resume=again, **arguments)


def _report(recipe: Recipe, folder: Path, prepared: Prepared, final: str) -> None:
    from .evaluation import evaluate_perplexity, evaluate_tasks
    from .plan import PruningPlan
    from .report import Report, Stage, count_parameters, versions
    from .trainer.models import load_to_run, load_tokenizer

    evaluate = recipe.evaluate
    options: dict[str, Any] = {key: getattr(evaluate, key) for key in ("seq_len", "stride", "drop_tail", "max_chars")}
    places = {"dense": prepared.folder, "pruned": folder / PRUNED}
    trainable = None
    if final == RECOVERED:
        places["recovered"] = folder / RECOVERED
        log = json.loads((folder / RECOVERED / "training_log.json").read_text(encoding="utf-8"))
        trainable = log["trainable"]
    stages = []
    for name, place in places.items():
        model, tokenizer = load_to_run(place, prepared.request.device), load_tokenizer(place)
        perplexity = {}
        for source in evaluate.data:
            result = evaluate_perplexity(model, tokenizer, source, **options)
            perplexity[result.dataset] = result
        tasks = evaluate_tasks(model, tokenizer, list(evaluate.tasks)) if evaluate.tasks else None
        stages.append(
            Stage(name, count_parameters(model), trainable if name == RECOVERED else None, perplexity, tasks)
        )
        # two of them may be too much for a GPU
        del model
    plan = PruningPlan.load(folder / PRUNED / "prune_plan.json")
    calibration = tuple(prepared.calibration.record()) if prepared.calibration else ()
    name = recipe.without_paths().model
    report = Report(name, tuple(stages), plan.summary(), versions(), recipe.seed, calibration)
    report.plot(folder / PLOT, overwrite=True)
    report.save(folder / REPORT, overwrite=True)


def _publish(recipe: Recipe, folder: Path, final: str) -> str:
    """Complete the folder that `push` would send, and say what there is to say."""
    from . import hub
    from .model_cards.card import create_model_card
    from .report import Report

    for name in (REPORT, PLOT, "recipe.yaml"):
        shutil.copyfile(folder / name, folder / final / name)
    name = recipe.card.name or f"{Path(recipe.without_paths().model).name}-pruned"
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
    return f"\n`gqaprune push {folder / final} ORG/NAME` would send:\n{listing}\n\n{table}\n\n{load}"
