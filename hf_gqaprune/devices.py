"""A device's name goes in; where this process computes comes out, or one line that says why it cannot."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import UsageError, WorkError

CPU = torch.device("cpu")


def choose(name: str | None) -> torch.device:
    """`cpu`, `cuda` or `cuda:N`; None: the first GPU (CUDA or ROCm), or the CPU where there is none.

    Raises:
        UsageError: another name, or a GPU that is not there. Re-fitting is done in float64, which MPS lacks.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda", 0) if count else CPU
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if not match:
        raise UsageError(f"--device {name!r} must be cpu, cuda or cuda:N")
    if name == "cpu":
        return CPU
    index = int(match[1] or 0)
    if index >= count:
        there = ", ".join(f"cuda:{index}" for index in range(count)) or "no GPU that torch can use"
        raise UsageError(f"--device {name}: this machine has {there}: choose another, or leave --device out")
    return torch.device("cuda", index)


@contextmanager
def within(device: torch.device, way_out: str, size: int | None = None) -> Iterator[None]:
    """Let this process take no more than `size` bytes of a GPU's memory, None for all of it, until the block ends.

    Raises:
        WorkError: it was too little; one line that ends in `way_out`.
    """
    gpu = device.type == "cuda"
    if gpu and size is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, size / total), device)
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        raise WorkError(f"the memory of {device} is full ({reason}): {way_out}") from error
    finally:
        if gpu:
            torch.cuda.set_per_process_memory_fraction(1.0, device)


def release() -> None:
    """Give back what is no longer used of a GPU's memory, so that another process finds it."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
