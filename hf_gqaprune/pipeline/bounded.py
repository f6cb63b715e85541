"""Run a prepared request with one decoder layer in memory at a time.

Statistics stay in a hidden folder until the plan or checkpoint they serve is complete, so that `--resume` finds them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from ..models import ModelShape
from ..plan import PruningPlan
from ..selection import make_plan
from ..statistics import CRITERIA, Statistics
from ..streaming import (
    memory_capacity,
    moments_disk_bytes,
    prune_checkpoint,
    statistics_disk_bytes,
    statistics_inputs,
    stream_statistics,
    streams_disk_bytes,
)
from ..utils import (
    PROGRESS,
    check_disk_space,
    filesystem_of,
    memory_limit,
    parse_size,
    refuse_existing,
    refuse_overwriting_inputs,
    refuse_unfinished,
    remove_working_folder,
    resume_or_start,
    size_on_disk,
    working_folder,
    write_json,
)
from .request import Prepared, record
from .stages import timed

_WAY_OUT = "what was finished is kept for --resume; more --memory, a shorter --seq-len, or --device cpu"


@contextmanager
def measured(prepared: Prepared, target: Path, *, overwrite: bool, resume: bool) -> Iterator[Statistics]:
    """Yield the statistics that a request names, or measure them beside `target` and drop them when the block succeeds.

    With `save_statistics` they are measured beside that folder and take its name in the end.

    Raises:
        UsageError: `save_statistics` exists, or the folder is of an interrupted call and this one may not go on with it.
        WorkError: as `stream_statistics`.
    """
    if prepared.statistics is not None:
        yield prepared.statistics
        return
    kept = prepared.request.save_statistics
    place = refuse_existing(kept, False, hint="give --save-statistics another name") if kept else target
    working = _measured_folder(place)
    with _streamed(prepared, working, overwrite=overwrite, resume=resume) as statistics:
        yield statistics
        if kept:
            place.parent.mkdir(parents=True, exist_ok=True)
            os.rename(working / "statistics", place)
        remove_working_folder(working)


def prune_bounded(prepared: Prepared, output: str | Path, *, overwrite: bool, resume: bool) -> PruningPlan:
    """Measure, decide and prune layer by layer, or replay a saved plan; what `prune_model` says of `request.pruning.memory`.

    Returns:
        The plan that was applied.

    Raises:
        UsageError: as `prune_checkpoint`, before any work.
        WorkError: something failed; what was finished is kept for `resume`.
    """
    request, target = prepared.request, Path(output)
    # hours before prune_checkpoint would say so
    refuse_unfinished(working_folder(target), resume, overwrite)
    refuse_overwriting_inputs(target, [prepared.source, *filter(None, [request.statistics])])
    compensation = request.compensation
    if prepared.plan is not None and compensation == "none":
        prune_checkpoint(
            prepared.source, prepared.plan, target, overwrite=overwrite, resume=resume, known=record(prepared)
        )
        return prepared.plan
    _check_room(prepared, target)
    with measured(prepared, target, overwrite=overwrite, resume=resume) as statistics:
        plan = prepared.plan or make_plan(statistics, prepared.selection())
        moments = statistics if compensation != "none" else None
        with timed("pruning"), _bounded(prepared):
            prune_checkpoint(
                prepared.source, plan, target, moments,
                compensation=compensation, overwrite=overwrite, resume=resume, device=prepared.device,
                dtype=prepared.dtype, spare=_spare(prepared),
                known=record(prepared),
            )  # fmt: skip
    return plan


def drop_unfinished(target: Path) -> None:
    """Remove what interrupted calls for the output `target` left; [`UsageError`] where one of them is at work."""
    for working in (working_folder(target), _measured_folder(target)):
        refuse_unfinished(working, resume=False, overwrite=True)
        remove_working_folder(working)


def _check_room(prepared: Prepared, target: Path) -> None:
    """Raise [`UsageError`] where the disk will not hold moments, streams and the pruned weights beside each other.

    Said before hours of measuring; what is looked at alone is checked again by those who write it.
    """
    request, measured_now = prepared.request, prepared.statistics is None
    source, dtype = ModelShape.from_config(prepared.source.config), prepared.source.dtype
    rule = CRITERIA[prepared.criterion_to_measure]
    left = source.cost.parameters
    if prepared.plan is not None:
        left = prepared.plan.after.parameters
    elif prepared.budget is not None and request.pruning.rates is None:
        left -= round(prepared.budget.parameters)
    windows = prepared.calibration if measured_now else prepared.statistics and prepared.statistics.calibration
    refitted = windows is not None and request.compensation == "least_squares"
    held = memory_capacity(prepared.device, _spare(prepared))
    streams = streams_disk_bytes(windows.tokens, source.hidden_size, dtype, held) if windows and refitted else 0
    moments = sum(moments_disk_bytes(source, rule)) if measured_now and windows else 0
    measuring = statistics_disk_bytes(source, dtype, prepared.calibration, rule, held)
    weights = left * dtype.itemsize + streams
    place, working = _measured_folder(Path(request.save_statistics or target)), working_folder(target)
    if filesystem_of(place) == filesystem_of(working):
        most = max(measuring, moments + weights) - size_on_disk(working)
        check_disk_space(place, most, "statistics, activations and the pruned weights")
    else:
        check_disk_space(place, max(measuring, moments), "statistics and activations")
        check_disk_space(working, weights, "the pruned weights")


def _measured_folder(place: Path) -> Path:
    """Return where the statistics for `place` stay until it is complete."""
    return place.absolute().parent / f".{place.name}.measured"


def _bounded(prepared: Prepared) -> AbstractContextManager[None]:
    """Bound the memory of what computes in the block."""
    memory = prepared.request.pruning.memory
    return memory_limit(prepared.device, _WAY_OUT, parse_size(memory) if memory else None)


@contextmanager
def _streamed(prepared: Prepared, working: Path, *, overwrite: bool, resume: bool) -> Iterator[Statistics]:
    """Measure into `working`, or take what an interrupted call has measured there; until the block ends it is this call's."""
    source, seed, device = prepared.source, prepared.request.seed, prepared.device
    criterion = prepared.criterion_to_measure
    inputs = statistics_inputs(source, prepared.calibration, criterion, seed, device, prepared.dtype)
    done = working / "statistics"
    with resume_or_start(working, resume, overwrite, inputs) as noted:
        write_json(working / PROGRESS, noted)
        if not done.exists():
            # what `resume_or_start` let through was begun with the same inputs
            with timed("statistics"), _bounded(prepared):
                stream_statistics(
                    source, prepared.calibration, done,
                    criterion=criterion, seed=seed, resume=True, device=device, dtype=prepared.dtype, spare=_spare(prepared),
                )  # fmt: skip
        yield Statistics.load(done)


def _spare(prepared: Prepared) -> int:
    """Return what activations may take of a GPU's memory: half of what is left, as an allocator keeps more than is in use."""
    return prepared.spare // 2
