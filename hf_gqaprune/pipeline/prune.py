"""TODO."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint import fingerprint, write_checkpoint
from ..data import text_paths
from ..errors import UsageError
from ..plan import PruningPlan
from ..selection import MEASURING, load_for_planning, make_plan, measure_layers
from ..statistics import Statistics, collect_statistics
from ..surgery import prune
from ..utils import AUTO, distributed, new_folder, refuse_existing, refuse_lost, within
from .bounded import drop_unfinished, measured, prune_bounded
from .request import Prepared, PruneRequest, prepare, record

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLAN = "plan.json"
MEMORY_HINT = "--memory SIZE reads the model layer by layer, --device cpu uses no GPU"


def decide(prepared: Prepared, model: PreTrainedModel) -> tuple[PruningPlan, Statistics]:
    """Measure what has not been measured yet, and choose the plan that has not been given."""
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
        if request.save_statistics and distributed.index() == 0:
            statistics.save(request.save_statistics)
    if prepared.plan is not None:
        return prepared.plan, statistics
    windows, how = prepared.calibration or statistics.calibration, request.allocation
    scores = measure_layers(model, windows) if windows and how == "layer_importance" else None
    looked_at = model if how in MEASURING else None
    return make_plan(statistics, model=looked_at, layer_scores=scores, **request.demand()), statistics


def _loaded(prepared: Prepared) -> PreTrainedModel:
    """The model with its weights, where the request wants it."""
    return prepared.folder.load(device=AUTO if prepared.request.device == AUTO else prepared.device)


def plan_model(
    request: PruneRequest, output: str | Path, *, overwrite: bool = False, resume: bool = False
) -> PruningPlan:
    """The dry run: decide, write the plan alone. `random` reads the config alone.

    With `request.memory` the model is measured layer by layer, which may be resumed: see `bounded`.
    """
    target = Path(output)
    if target.is_dir():
        raise UsageError(f"{target} is a folder, and a plan is one file: name a file, such as {target / PLAN}")
    refuse_existing(target, overwrite, file=True)
    if resume and not request.memory:
        raise UsageError("only a plan with --memory can be resumed: leave --resume out")
    prepared = prepare(request, planning_only=True)
    refuse_lost_inputs(target, prepared)
    target.parent.mkdir(parents=True, exist_ok=True)
    weights = prepared.criterion != "random" or request.allocation in ("layer_importance", "search")
    if request.memory and weights:
        with measured(prepared, target, overwrite=overwrite, resume=resume) as statistics:
            plan = make_plan(statistics, **request.demand())
            plan.save(target)
        return plan
    with within(prepared.device, MEMORY_HINT):
        model = _loaded(prepared) if weights else load_for_planning(prepared.folder, weights=False)
        plan = decide(prepared, model)[0]
    if distributed.index() == 0:
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
    refuse_existing(output, overwrite)
    if resume and not request.streamed:
        raise UsageError(
            "only what goes layer by layer can be resumed, --memory SIZE or a saved plan without compensation: "
            "leave --resume out"
        )
    kept = request.save_statistics
    if kept is not None and Path(kept).resolve().is_relative_to(Path(output).resolve()):
        raise UsageError(f"the statistics, {kept}, would lie in the output {output}: name a folder beside it")
    prepared = prepare(request)
    refuse_lost_inputs(output, prepared)
    if overwrite and not resume and distributed.index() == 0:
        drop_unfinished(Path(output))
    if request.streamed:
        return prune_bounded(prepared, output, overwrite=overwrite, resume=resume)
    with within(prepared.device, MEMORY_HINT):
        model = _loaded(prepared)
        plan, statistics = decide(prepared, model)
        pruned = prune(model, plan, statistics, compensation=request.fitting, inplace=True)
    if distributed.index() == 0:
        base = fingerprint(prepared.folder)
        with new_folder(output, overwrite) as scratch:
            whole = PruningPlan.from_dict(pruned.prune_plan)
            known = {"plan_hash": whole.hash(), "base_fingerprint": base, **record(prepared)}
            write_checkpoint(pruned, prepared.folder, scratch, **known)
    distributed.wait()
    return plan


def refuse_lost_inputs(target: str | Path, prepared: Prepared, texts: Iterable[str] = ()) -> None:
    """Raise [`UsageError`] where `target` would replace what a request reads, or one of the `texts`."""
    request = prepared.request
    files = [path for path in (request.plan, request.statistics) if path is not None]
    refuse_lost(target, [prepared.folder, *text_paths((*request.calibration, *texts)), *files])
