"""Choose the device and the dtype to compute in, bound the memory of a GPU, and spread a model over several."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import UsageError, WorkError

CPU = torch.device("cpu")
#: all GPUs, each with some of the layers
AUTO = "auto"


def select_device(name: str | None) -> torch.device:
    """Return the device `cpu`, `cuda` or `cuda:N`; for None and `auto` the first GPU (CUDA or ROCm), or else the CPU.

    Raises:
        UsageError: another name, or a GPU that does not exist. Refitting uses float64, which MPS lacks.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name in (None, AUTO):
        return torch.device("cuda", 0) if count else CPU
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if not match:
        raise UsageError(f"--device {name!r} must be cpu, cuda, cuda:N or auto")
    if name == "cpu":
        return CPU
    index = int(match[1] or 0)
    if index >= count:
        there = ", ".join(f"cuda:{index}" for index in range(count)) or "no GPU that torch can use"
        raise UsageError(f"--device {name}: this machine has {there}: choose another, or leave --device out")
    return torch.device("cuda", index)


@functools.cache
def compute_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Choose the dtype to compute in with weights stored as `stored`: float32 where products in it are faster.

    The model keeps its stored dtype on disk. float16 is never computed in on a CPU, where its sums overflow.
    """
    if stored not in (torch.float16, torch.bfloat16):
        return stored
    if device.type == "cuda":
        native = stored == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
        return stored if native else torch.float32
    return stored if stored == torch.bfloat16 and _fast(stored) else torch.float32


def _fast(dtype: torch.dtype, size: int = 256) -> bool:
    """Time a layer's product and that of its backward pass on the CPU, some milliseconds, against float32."""

    def seconds(dtype: torch.dtype) -> float:
        x, weight = (torch.ones(size, size, dtype=dtype) for _ in range(2))
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            x @ weight
            best = min(best, time.perf_counter() - start)
        return best

    return seconds(dtype) < seconds(torch.float32)


@contextmanager
def memory_limit(device: torch.device, hint: str, size: int | None = None) -> Iterator[None]:
    """Limit this process to `size` bytes of a GPU's memory, None for all of it, until the block ends.

    Raises:
        WorkError: the device ran out of memory; the message ends in `hint`.
    """
    bound = size if device.type == "cuda" else None
    if bound is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        before = torch.cuda.get_per_process_memory_fraction(device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, bound / total), device)
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        raise WorkError(f"the memory of {device} is full ({reason}): {hint}") from error
    finally:
        if bound is not None:
            torch.cuda.set_per_process_memory_fraction(before, device)


def dispatch(model: Any, places: Mapping[str, int | str | torch.device]) -> None:
    """Attach accelerate's hooks so that `model`, whose parts are on the devices of `places` (a `hf_device_map`), can run."""
    from accelerate.hooks import attach_align_device_hook_on_blocks

    if len(set(places.values())) < 2:
        return
    devices = {name: torch.device(place) for name, place in places.items()}
    # hidden states go from device to device, and the result back to where the input was
    attach_align_device_hook_on_blocks(model, devices | {"": next(iter(devices.values()))}, dict.fromkeys(devices, False))
    model.hf_device_map = dict(places)
