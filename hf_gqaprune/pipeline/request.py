"""Check a request to prune against config, names and texts before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..checkpoint import ModelFolder, read_identity, resolve_model
from ..compensation import steps_peak_bytes
from ..configuration import DEFAULT_CRITERION, PruneRequest, PruningConfig
from ..data import Calibration, Text, load_weighted_texts, sample_windows, sampling_bytes
from ..errors import UsageError
from ..models import ModelShape
from ..plan import PruningPlan
from ..selection import Budget, check_budget
from ..statistics import CRITERIA, Statistics
from ..streaming import Layers, Workload, check_gpu_memory, check_memory_bound
from ..surgery import check_moments, check_windows
from ..utils import AUTO, compute_dtype, distributed, parse_size, select_device

#: the criterion measured for a saved plan: the refit then reads moments weighted like those the plan was made from
FOR_REFITTING = "curvature"


@dataclass(frozen=True)
class Prepared:
    """A request whose every part was found to make sense, before any weight was read.

    Attributes:
        dtype: what is computed in; the result has the dtype of `source`.
        source: the model that is pruned, its parts opened once.
        criterion: what units are ranked by.
        budget: what is removed; None for a saved plan.
        calibration: windows to measure on; None where nothing is measured, or saved statistics hold them.
        spare: bytes of a bound on memory that the work leaves.
    """

    request: PruneRequest
    device: torch.device
    dtype: torch.dtype
    source: ModelFolder
    criterion: str
    budget: Budget | None
    plan: PruningPlan | None
    statistics: Statistics | None
    calibration: Calibration | None
    spare: int = 0

    @property
    def criterion_to_measure(self) -> str:
        """The criterion of the calibration pass."""
        return self.criterion if self.plan is None else FOR_REFITTING

    def selection(self) -> PruningConfig:
        """Return what `make_plan` takes of the request."""
        return replace(self.request.pruning, memory=None, device=None, dtype=None)


def prepare(request: PruneRequest, *, planning_only: bool = False) -> Prepared:
    """Check a request against the config, names and texts that it names; no weight is read.

    Args:
        request: what is asked for.
        planning_only: no weights will be written, so that nothing has to be refitted.

    Raises:
        UsageError: for whatever makes no sense.
    """
    pruning, replayed = request.pruning, request.plan is not None
    device = _device(request)
    statistics = Statistics.load(request.statistics) if request.statistics else None
    criterion: str = pruning.criterion or (statistics.criterion if statistics else DEFAULT_CRITERION)
    if statistics is not None and not replayed and criterion != statistics.criterion:
        raise UsageError(
            f"the statistics in {request.statistics} were collected for criterion {statistics.criterion}, "
            f"not {criterion}: leave --criterion or --statistics out"
        )
    if pruning.method == "query_heads" and not replayed and criterion != "curvature":
        raise UsageError(f"allocation query_heads prices by criterion curvature, not {criterion}: leave --criterion out")
    if pruning.memory is not None:
        _check_streamable(request)
    source = resolve_model(request.model)
    shape = ModelShape.from_config(source.config)
    scored = pruning.method in ("layer_importance", "search") and not replayed
    reads_weights = not (planning_only and criterion == "random") or scored
    dtype, layers = torch.float32, None
    if reads_weights:
        dtype = getattr(torch, pruning.dtype) if pruning.dtype else compute_dtype(source.dtype, device)
        layers = Layers(source, device, dtype)
    plan = budget = None
    if request.plan is not None:
        plan = PruningPlan.load(request.plan).for_model(source.config)
    else:
        budget = check_budget(pruning, shape)
    if statistics is not None and statistics.source != shape:
        raise UsageError(f"the statistics in {request.statistics} were collected on a model of other sizes")
    refit = request.compensation != "none" and not planning_only
    known = statistics.calibration if statistics else None
    measures = CRITERIA[criterion].calibrated and not replayed
    draws = (statistics is None and (measures or refit)) or (scored and known is None)
    samples, seq_len = (0, 0) if known is None else known.ids.shape
    texts: list[tuple[Text, float]] = []
    if draws:
        samples, seq_len = request.calibration.samples, _seq_len(request, source)
        texts = load_weighted_texts(request.calibration.data)
    if refit:
        if statistics is not None:
            check_moments(request.compensation, statistics)
        check_windows(request.compensation, samples)
    pass_rule = CRITERIA[FOR_REFITTING if replayed else criterion]
    rule = pass_rule if statistics is None and (not replayed or refit) else None
    if layers is not None and not request.streamed and device.type == "cuda" and pruning.device != AUTO:
        total = torch.cuda.get_device_properties(device).total_memory
        check_gpu_memory(shape, layers.dtype.itemsize, rule, total)
        if refit and request.compensation == "natural_gradient":
            check_steps_memory(plan.target if plan else _pruned_shape(shape, budget), shape, layers.dtype.itemsize, total)
    spare = 0
    if pruning.memory is not None and layers is not None:
        work = Workload(
            shape,
            layers.dtype.itemsize,
            samples,
            seq_len,
            rule,
            refitted=refit,
            stored=layers.stored_itemsize,
            text=sampling_bytes(source.tokenizer, texts, samples, seq_len) if draws else 0,
            gpu=device.type == "cuda",
        )
        spare = check_memory_bound(work, pruning.memory)
    calibration = sample_windows(source.tokenizer, texts, samples, seq_len, request.seed) if draws else None
    return Prepared(request, device, dtype, source, criterion, budget, plan, statistics, calibration, spare)


def check_steps_memory(pruned: ModelShape, dense: ModelShape, itemsize: int, total: int) -> None:
    """Raise [`UsageError`] where a GPU of `total` bytes does not hold the dense model and the natural-gradient steps."""
    needed = dense.cost.parameters * itemsize + steps_peak_bytes(pruned)
    if needed > total:
        raise UsageError(
            f"the steps of compensation natural_gradient take about {needed / 2**30:.0f} GiB, and the GPU has "
            f"{total / 2**30:.0f} GiB: choose --compensation least_squares, or --device auto to use all GPUs"
        )


def _pruned_shape(shape: ModelShape, budget: Budget | None) -> ModelShape:
    """Estimate the sizes after pruning, before they are planned: every FFN narrower by the fraction to remove."""
    removed = budget.parameters / shape.cost.backbone_parameters if budget else 0.0
    layers = tuple(replace(layer, ffn=round(layer.ffn * (1 - removed))) for layer in shape.layers)
    return replace(shape, layers=layers)


def record(prepared: Prepared) -> dict[str, Any]:
    """Collect what `gqaprune.json` keeps of a request: the calibration texts, the seed and the compensation.

    Texts that the model was calibrated on before, where it was pruned already, are kept.
    """
    earlier = (read_identity(prepared.source) or {}).get("calibration", [])
    calibration = [*earlier, *(source for source in calibrated_on(prepared) if source not in earlier)]
    return {"calibration": calibration, "seed": prepared.request.seed, "compensation": prepared.request.compensation}


def calibrated_on(prepared: Prepared) -> list[dict[str, Any]]:
    """List, as `Calibration.record()` does, all text that a request reads or that its saved statistics were measured on."""
    measured = prepared.statistics.calibration if prepared.statistics else None
    return [source for windows in (measured, prepared.calibration) if windows for source in windows.record()]


def _seq_len(request: PruneRequest, source: ModelFolder) -> int:
    """Return the tokens of a calibration window; raise [`UsageError`] for more than the model's positions."""
    limit = int(source.config.max_position_embeddings)
    seq_len = request.calibration.seq_len or min(2048, limit)
    if seq_len > limit:
        raise UsageError(f"seq_len={seq_len} is longer than the {limit} positions of {request.model}")
    return seq_len


def _device(request: PruneRequest) -> torch.device:
    """Choose where this process computes; raise [`UsageError`] for no such device, or several processes at one's work."""
    assigned, asked = distributed.init(), request.pruning.device
    if asked == AUTO and request.streamed:
        raise UsageError(
            "--device auto spreads a whole model over all GPUs; --memory, and a saved plan without compensation, use one: "
            "leave --device out"
        )
    if assigned is None:
        return select_device(asked)
    if request.streamed:
        raise UsageError(
            "--memory, and a saved plan without compensation, are the work of one process: leave accelerate launch out"
        )
    if asked is not None:
        raise UsageError(f"--device {asked}: accelerate launch gives every process its own: leave --device out")
    return assigned


def _check_streamable(request: PruneRequest) -> None:
    """Raise [`UsageError`] for what cannot be done layer by layer."""
    parse_size(request.pruning.memory or "")
    needs = {"natural_gradient": "both models", "bias": "the model"}
    if request.compensation in needs:
        raise UsageError(
            f"compensation {request.compensation} needs {needs[request.compensation]} in memory: with --memory choose "
            "least_squares or none"
        )
    method = request.pruning.method
    if method in ("search", "layer_importance", "query_heads") and request.plan is None:
        raise UsageError(
            f"allocation {method} needs the whole model, which --memory does not load: choose global, uniform or per_layer"
        )
