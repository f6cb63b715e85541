"""A request to prune goes in, checked against config, names and texts; nothing of the weights but their headers is read."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from ..checkpoint import ModelFolder, read_identity, resolve_model
from ..data import Calibration, draw, drawing, texts_of
from ..errors import UsageError, unknown
from ..models import ModelShape
from ..plan import PruningPlan
from ..selection import Demand, check_budget
from ..statistics import CRITERIA, DEFAULT, Statistics
from ..streaming import Layers, Work, check_bound, check_gpu
from ..surgery import COMPENSATIONS
from ..utils import AUTO, choose, distributed, parse_size

#: the criterion that is measured for a saved plan, which needs no curves, only what re-fitting reads
FOR_REFITTING = "magnitude"


@dataclass(frozen=True)
class PruneRequest:
    """What `plan` and `prune` are asked for; see `make_plan`, `prune` and `Calibration.from_text` for the fields.

    Attributes:
        compensation: None: `natural_gradient`, or with `memory` the best that needs no whole model, `least_squares`.
        memory: bound on the memory of the GPU that is used, or else of the process, such as `8GiB`; the model is then read
            layer by layer.
        device: `cpu`, `cuda` or `cuda:N`; None: the first GPU, or the CPU where there is none; `auto`: over all GPUs.
    """

    model: str
    ratio: float | None = None
    backbone_ratio: float | None = None
    criterion: str | None = None
    allocation: str | None = None
    temperature: float | None = None
    attention_share: float | None = None
    rates: tuple[float, ...] | None = None
    min_kv_heads: int = 1
    min_ffn: int = 1
    keep_layers: tuple[int, ...] = ()
    round_to: int | None = None
    compensation: str | None = None
    calibration: tuple[str, ...] = ()
    samples: int = 128
    seq_len: int | None = None
    seed: int = 0
    statistics: str | None = None
    save_statistics: str | None = None
    plan: str | None = None
    memory: str | None = None
    device: str | None = None

    @property
    def fitting(self) -> str:
        """The compensation, whether it was named or not."""
        return self.compensation or ("least_squares" if self.memory else "natural_gradient")

    @property
    def streamed(self) -> bool:
        """Whether it is done layer by layer: within a bound, or because a saved plan is only replayed."""
        return self.memory is not None or (self.plan is not None and self.fitting == "none")

    def demand(self) -> dict[str, Any]:
        """The arguments of `make_plan` that say how much goes, and from where."""
        names = [field.name for field in fields(Demand) if field.name != "bias"]
        return {name: getattr(self, name) for name in names} | {"bias": self.fitting == "bias"}


@dataclass(frozen=True)
class Prepared:
    """A request whose every part was found to make sense, before any weight was read.

    Attributes:
        spare: bytes of a bound on memory that the work leaves.
    """

    request: PruneRequest
    device: torch.device
    folder: ModelFolder
    criterion: str
    plan: PruningPlan | None
    statistics: Statistics | None
    calibration: Calibration | None
    spare: int = 0

    @property
    def measured(self) -> str:
        """The criterion to measure."""
        return self.criterion if self.plan is None else FOR_REFITTING


def prepare(request: PruneRequest, *, planning_only: bool = False) -> Prepared:
    """Check a request against the config, names and texts that it names; no weight is read.

    Args:
        request: what is asked for.
        planning_only: no weights will be written, so that nothing has to be re-fitted.

    Raises:
        UsageError: for whatever makes no sense.
    """
    device = _device(request)
    statistics = Statistics.load(request.statistics) if request.statistics else None
    criterion = request.criterion or (statistics.criterion if statistics else DEFAULT)
    if criterion not in CRITERIA:
        raise unknown("criterion", criterion, CRITERIA)
    if statistics is not None and request.plan is None and criterion != statistics.criterion:
        raise UsageError(
            f"the statistics in {request.statistics} were collected for criterion {statistics.criterion}, "
            f"not {criterion}: leave --criterion or --statistics out"
        )
    if request.allocation == "query_heads" and request.plan is None and criterion != "curvature":
        raise UsageError(f"allocation query_heads prices by criterion curvature, not {criterion}: leave --criterion out")
    if request.fitting not in COMPENSATIONS:
        raise unknown("compensation", request.fitting, COMPENSATIONS)
    if request.memory is not None:
        _check_streamable(request)
    folder = resolve_model(request.model)
    config = folder.config
    shape = ModelShape.from_config(config)
    scored = request.allocation in ("layer_importance", "search") and request.plan is None
    read = not (planning_only and criterion == "random") or scored
    layers = Layers(folder) if read else None
    plan = None
    if request.plan is not None:
        plan = PruningPlan.load(request.plan)
        plan.check_model(config)
    else:
        check_budget(shape, Demand(**request.demand()))
    if statistics is not None and statistics.source != shape:
        raise UsageError(f"the statistics in {request.statistics} were collected on a model of other sizes")
    refit = request.fitting != "none" and not planning_only
    measured = CRITERIA[criterion].calibrated and plan is None
    known = statistics.calibration if statistics else None
    drawn = (statistics is None and (measured or refit)) or (scored and known is None)
    samples, seq_len = (0, 0) if known is None else known.ids.shape
    tokenizer, texts = None, []
    if drawn:
        samples, seq_len = request.samples, _seq_len(request, config)
        tokenizer = folder.tokenizer
        texts = texts_of(request.calibration or ("wikitext2",))
    now = CRITERIA[criterion if plan is None else FOR_REFITTING]
    rule = now if statistics is None and (plan is None or refit) else None
    if layers is not None and not request.streamed and device.type == "cuda" and request.device != AUTO:
        check_gpu(shape, layers.dtype.itemsize, rule, torch.cuda.get_device_properties(device).total_memory)
    spare = 0
    if request.memory is not None and layers is not None:
        work = Work(
            shape,
            layers.dtype.itemsize,
            samples,
            seq_len,
            rule,
            refitted=refit,
            stored=layers.stored_itemsize,
            text=drawing(tokenizer, texts) if drawn else 0,
            gpu=device.type == "cuda",
        )
        spare = check_bound(work, request.memory)
    calibration = draw(tokenizer, texts, samples, seq_len, request.seed) if drawn else None
    return Prepared(request, device, folder, criterion, plan, statistics, calibration, spare)


def _seq_len(request: PruneRequest, config: Any) -> int:
    """Tokens of a calibration window; [`UsageError`] for more than the model's positions."""
    limit = int(config.max_position_embeddings)
    seq_len = min(2048, limit) if request.seq_len is None else request.seq_len
    if seq_len > limit:
        raise UsageError(f"seq_len={seq_len} is longer than the {limit} positions of {request.model}")
    return seq_len


def _device(request: PruneRequest) -> torch.device:
    """Where this process computes; [`UsageError`] for no such device, and for several processes at the work of one."""
    given = distributed.join()
    if request.device == AUTO and request.streamed:
        raise UsageError(
            "--device auto lays a whole model over all GPUs; --memory, and a saved plan without compensation, take one: "
            "leave --device out"
        )
    if given is None:
        return choose(request.device)
    if request.streamed:
        raise UsageError(
            "--memory, and a saved plan without compensation, are the work of one process: leave accelerate launch out"
        )
    if request.device is not None:
        raise UsageError(f"--device {request.device}: accelerate launch gives every process its own: leave --device out")
    return given


def _check_streamable(request: PruneRequest) -> None:
    """Raise [`UsageError`] for what cannot be done layer by layer."""
    parse_size(request.memory or "")
    needs = {"natural_gradient": "both models", "bias": "the model"}
    if request.fitting in needs:
        raise UsageError(
            f"compensation {request.fitting} needs {needs[request.fitting]} in memory: with --memory choose least_squares "
            "or none"
        )
    if request.allocation in ("search", "layer_importance", "query_heads") and request.plan is None:
        raise UsageError(
            f"allocation {request.allocation} needs the whole model, which --memory does not load: "
            "choose global, uniform or per_layer"
        )


def record(prepared: Prepared) -> dict[str, Any]:
    """For `gqaprune.json` of what a request prunes: which text was calibrated on, the seed and the compensation.

    What was calibrated on before, where the model was pruned already, stays.
    """
    earlier = (read_identity(prepared.folder) or {}).get("calibration", [])
    calibration = [*earlier, *(source for source in calibrated_on(prepared) if source not in earlier)]
    return {"calibration": calibration, "seed": prepared.request.seed, "compensation": prepared.request.fitting}


def calibrated_on(prepared: Prepared) -> list[dict[str, Any]]:
    """`Calibration.record()` of all text that a request reads, or that its saved statistics were measured on."""
    measured = prepared.statistics.calibration if prepared.statistics else None
    return [source for windows in (measured, prepared.calibration) if windows for source in windows.record()]
