"""Run the commands plan and prune with the whole model in memory, or hand them to the streamed path."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint import fingerprint, write_checkpoint
from ..configuration import PruneRequest
from ..data import text_paths
from ..errors import UsageError
from ..models import empty_model
from ..plan import PruningPlan
from ..selection import MEASURING, make_plan, measure_layers
from ..statistics import Statistics, collect_statistics
from ..surgery import prune
from ..utils import AUTO, distributed, memory_limit, new_folder, refuse_existing, refuse_overwriting_inputs
from .bounded import drop_unfinished, measured, prune_bounded
from .request import Prepared, prepare, record
from .stages import timed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

PLAN = "plan.json"
_HINT = "--memory SIZE reads the model layer by layer, --device cpu uses no GPU"


def decide(prepared: Prepared, model: PreTrainedModel, *, refits: bool = True) -> tuple[PruningPlan, Statistics]:
    """Measure what has not been measured yet, and choose the plan that has not been given.

    Moments are kept only if they are used afterwards: they take a multiple of the model's memory.
    """
    request, statistics = prepared.request, prepared.statistics
    keeps = refits or request.save_statistics is not None or prepared.selection().method in MEASURING
    if statistics is None:
        with timed("statistics"):
            statistics = collect_statistics(
                model,
                prepared.calibration,
                criterion=prepared.criterion_to_measure,
                moments=prepared.calibration is not None and keeps,
                seed=request.seed,
            )
        if request.save_statistics and distributed.index() == 0:
            statistics.save(request.save_statistics)
    if prepared.plan is not None:
        return prepared.plan, statistics
    selection, windows = prepared.selection(), prepared.calibration or statistics.calibration
    with timed("selection"):
        scores = measure_layers(model, windows) if windows and selection.method == "layer_importance" else None
        measured_model = model if selection.method in MEASURING else None
        plan = make_plan(statistics, selection, model=measured_model, layer_scores=scores)
    return plan, statistics


def _loaded(prepared: Prepared) -> PreTrainedModel:
    """Load the model where, and in the dtype that, it is computed with."""
    device = AUTO if prepared.request.pruning.device == AUTO else prepared.device
    model = prepared.source.load(prepared.dtype, device)
    # sizes in bytes are those of the checkpoint
    model.config.dtype = prepared.source.dtype
    return model


def plan_model(
    request: PruneRequest, output: str | Path, *, overwrite: bool = False, resume: bool = False
) -> PruningPlan:
    """Decide, and write the plan alone; the criterion `random` reads nothing but the config.

    With `request.pruning.memory` the model is measured layer by layer, which may be resumed: see `bounded`.

    Raises:
        UsageError: before any work, for whatever makes no sense.
        WorkError: measuring failed.
    """
    target = Path(output)
    if target.is_dir():
        raise UsageError(f"{target} is a folder, and a plan is one file: name a file, such as {target / PLAN}")
    refuse_existing(target, overwrite, file=True)
    memory = request.pruning.memory
    if resume and not memory:
        raise UsageError("only a plan with --memory can be resumed: leave --resume out")
    prepared = prepare(request, planning_only=True)
    refuse_lost_inputs(target, prepared)
    target.parent.mkdir(parents=True, exist_ok=True)
    weights = prepared.criterion != "random" or prepared.selection().method in ("layer_importance", "search")
    if memory and weights:
        with measured(prepared, target, overwrite=overwrite, resume=resume) as statistics:
            plan = make_plan(statistics, prepared.selection())
            plan.save(target)
        return plan
    with memory_limit(prepared.device, _HINT):
        model = _loaded(prepared) if weights else empty_model(prepared.source.config)
        plan = decide(prepared, model, refits=False)[0]
    if distributed.index() == 0:
        plan.save(target)
    return plan


def prune_model(
    request: PruneRequest,
    output: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    prepared: Prepared | None = None,
) -> PruningPlan:
    """Decide, prune, and write the checkpoint with tokenizer, generation config, plan and licence files.

    A saved plan without compensation is replayed shard by shard; with `request.pruning.memory` everything is read layer by
    layer. Both may be resumed: see `prune_checkpoint` and `bounded`.

    Args:
        prepared: `request`, where it has been prepared already.

    Returns:
        The plan that was applied to `request.model`. The checkpoint's own, in `prune_plan.json`, begins at the dense
        model where `request.model` was pruned before; that one's hash is in `gqaprune.json`.

    Raises:
        UsageError: before any work, for whatever makes no sense.
        WorkError: the work failed; what can be resumed is kept.
    """
    refuse_existing(output, overwrite)
    if resume and not request.streamed:
        raise UsageError(
            "only what is read layer by layer can be resumed, --memory SIZE or a saved plan without compensation: "
            "leave --resume out"
        )
    kept = request.save_statistics
    if kept is not None and Path(kept).resolve().is_relative_to(Path(output).resolve()):
        raise UsageError(f"the statistics, {kept}, would lie in the output {output}: name a folder beside it")
    prepared = prepared or prepare(request)
    refuse_lost_inputs(output, prepared)
    if overwrite and not resume and distributed.index() == 0:
        drop_unfinished(Path(output))
    if request.streamed:
        return prune_bounded(prepared, output, overwrite=overwrite, resume=resume)
    with memory_limit(prepared.device, _HINT):
        model = _loaded(prepared)
        plan, statistics = decide(prepared, model)
        with timed("pruning"):
            pruned = prune(model, plan, statistics, compensation=request.compensation, inplace=True)
    if distributed.index() == 0:
        source = prepared.source
        with timed("writing"), new_folder(output, overwrite) as scratch:
            whole = PruningPlan.from_dict(pruned.prune_plan)
            known = {"plan_hash": whole.hash(), "base_fingerprint": fingerprint(source), **record(prepared)}
            known |= pruned.compensation_record
            write_checkpoint(pruned.to(source.dtype), source.path, scratch, **known)
    distributed.barrier()
    return plan


def refuse_lost_inputs(target: str | Path, prepared: Prepared, texts: Iterable[str] = ()) -> None:
    """Raise [`UsageError`] where `target` would replace what a request reads, or one of the `texts`."""
    request = prepared.request
    files = [path for path in (request.plan, request.statistics) if path is not None]
    refuse_overwriting_inputs(target, [prepared.source, *text_paths((*request.calibration.data, *texts)), *files])
