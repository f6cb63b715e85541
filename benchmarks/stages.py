"""Measure each stage of pruning: seconds, peak memory and bytes, and the overhead of statistics over their bare passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from shapes import forget, forget_peak, peak_rss, proc, random_windows

import hf_gqaprune as gp
from hf_gqaprune.checkpoint import resolve_model
from hf_gqaprune.data.windows import split_batches
from hf_gqaprune.linalg.symmetric import add_gram_
from hf_gqaprune.models.checks import eval_without_grad
from hf_gqaprune.models.shapes import ModelShape
from hf_gqaprune.statistics import collect
from hf_gqaprune.statistics.criteria import CRITERIA
from hf_gqaprune.streaming.memory_bound import Workload, check_memory_bound
from hf_gqaprune.utils.device import memory_limit
from hf_gqaprune.utils.memory import parse_size

Figures = dict[str, Any]


def streamed(
    checkpoint: Path, scratch: Path, tokens: int, seq_len: int, backbone_ratio: float, device: torch.device, memory: str
) -> Figures:
    """Statistics, plan and least-squares pruning of a checkpoint, layer by layer, in this process.

    What a process that was killed left in `scratch` is gone on with.

    Args:
        memory: a bound on the GPU's, as `--memory` takes it; not looked at on the CPU.

    Returns:
        Per stage seconds, peak RSS, bytes read and written, on a GPU the memory that was taken and kept there; the estimate
        that `--memory` goes by.
    """
    shape = ModelShape.from_config(resolve_model(checkpoint).config)
    windows = gp.Calibration.from_ids(random_windows(shape.vocab_size, tokens, seq_len))
    gpu = device.type == "cuda"
    work = Workload(shape, 2, *windows.ids.shape, CRITERIA["curvature"], refitted=True, gpu=gpu)
    # as `bounded` does it
    place: Figures = {"device": device, "spare": check_memory_bound(work, memory) // 2 if gpu else 0}
    with memory_limit(device, "more --memory", parse_size(memory) if gpu else None):
        stages = _streamed(checkpoint, scratch, windows, backbone_ratio, place)
    return {
        "tokens": windows.tokens,
        "layers": len(shape.layers),
        "seconds": sum(stage["seconds"] for stage in stages.values()),
        "peak_rss": max(stage["peak_rss"] for stage in stages.values()),
        "estimated": work.peak()[1],
        "device": torch.cuda.get_device_name(device) if gpu else "cpu",
        "memory": memory if gpu else None,
        "stages": stages,
    }


def _streamed(checkpoint: Path, scratch: Path, windows: gp.Calibration, backbone_ratio: float, place: Figures) -> Figures:
    stages: Figures = {}
    with _measured(stages, "statistics", checkpoint):
        found = scratch / "statistics"
        done = found.exists()
        statistics = (
            gp.Statistics.load(found) if done else gp.stream_statistics(checkpoint, windows, found, resume=True, **place)
        )
    with _measured(stages, "plan", checkpoint):
        plan = gp.make_plan(statistics, backbone_ratio=backbone_ratio)
    with _measured(stages, "prune", checkpoint):
        gp.prune_checkpoint(
            checkpoint, plan, scratch / "pruned", statistics, compensation="least_squares", resume=True, **place
        )
    return stages


def in_memory(checkpoint: Path, tokens: int, seq_len: int, backbone_ratio: float) -> Figures:
    """Statistics of a loaded model against the bare passes and the bare products of the same tokens, all in this process.

    The products of one layer are measured and counted for all of them. Then plan and least-squares pruning.

    Returns:
        Seconds of each, `ratio` of the statistics without the curves to the bare work, `share` of selection (curves and
        plan) and compensation in the whole.
    """
    model = resolve_model(checkpoint).load()
    windows = gp.Calibration.from_ids(random_windows(model.config.vocab_size, tokens, seq_len))
    shape = ModelShape.from_config(model.config)
    seconds: dict[str, float] = {}
    with _timed(seconds, "bare passes"), eval_without_grad(model):
        collect._run(model, windows, backward=True)
    with _timed(seconds, "bare products"):
        _products(shape, windows, model.dtype)
    seconds["bare products"] *= len(shape.layers)
    forget_peak()
    with _curves(seconds), _timed(seconds, "statistics"):
        statistics = gp.collect_statistics(model, windows)
    seconds["statistics"] -= seconds["curves"]
    with _timed(seconds, "plan"):
        plan = gp.make_plan(statistics, backbone_ratio=backbone_ratio)
    with _timed(seconds, "compensation"):
        gp.prune(model, plan, statistics, compensation="least_squares", inplace=True)
    whole = sum(seconds[name] for name in ("statistics", "curves", "plan", "compensation"))
    return {
        "tokens": windows.tokens,
        "layers": len(shape.layers),
        "seconds": seconds,
        "ratio": seconds["statistics"] / (seconds["bare passes"] + seconds["bare products"]),
        "share": 1 - seconds["statistics"] / whole,
        "peak_rss": peak_rss(),
    }


def _products(shape: ModelShape, windows: gp.Calibration, dtype: torch.dtype) -> None:
    """The second moments of one layer: of the inputs of both output projections and of the gradients at their outputs."""
    layer, d = shape.layers[0], shape.hidden_size
    widths = (layer.query_heads * layer.head_dim, layer.ffn, d, d)
    sums = [torch.zeros(width, width) for width in widths]
    for batch in split_batches(windows.ids, shape.vocab_size):
        for total, width in zip(sums, widths, strict=True):
            add_gram_(total, torch.ones(batch.numel(), width, dtype=dtype))


@contextmanager
def _measured(stages: Figures, name: str, checkpoint: Path) -> Iterator[None]:
    forget(checkpoint)
    forget_peak()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    before, start = proc("io"), time.perf_counter()
    yield
    after = proc("io")
    gpu = torch.cuda.is_initialized()
    if gpu:
        torch.cuda.synchronize()
    stages[name] = {
        "seconds": time.perf_counter() - start,
        **({"gpu_taken": torch.cuda.max_memory_allocated(), "gpu_kept": torch.cuda.max_memory_reserved()} if gpu else {}),
        "peak_rss": peak_rss(),
        "bytes_read": after["rchar"] - before["rchar"],
        "bytes_written": after["wchar"] - before["wchar"],
        "bytes_from_disk": after["read_bytes"] - before["read_bytes"],
    }


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


@contextmanager
def _curves(seconds: dict[str, float]) -> Iterator[None]:
    """Time the criterion, the last step of `collect_statistics`."""
    real: Callable[..., Any] = collect.MomentHooks.statistics
    seconds["curves"] = 0.0

    def statistics(*args: Any) -> Any:
        start = time.perf_counter()
        try:
            return real(*args)
        finally:
            seconds["curves"] += time.perf_counter() - start

    collect.MomentHooks.statistics = statistics  # type: ignore[method-assign]
    try:
        yield
    finally:
        collect.MomentHooks.statistics = real  # type: ignore[method-assign]
