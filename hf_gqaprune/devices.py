"""A device's name goes in; where this process computes comes out, or one line that says why it cannot."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .errors import UsageError, WorkError

CPU = torch.device("cpu")
#: all GPUs, each with some of the layers
AUTO = "auto"


def choose(name: str | None) -> torch.device:
    """`cpu`, `cuda` or `cuda:N`; None and `auto`: the first GPU (CUDA or ROCm), or the CPU where there is none.

    Raises:
        UsageError: another name, or a GPU that is not there. Re-fitting is done in float64, which MPS lacks.
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


def check_held(model: nn.Module) -> None:
    """Raise [`UsageError`] where a weight of `model` is on no device, as what `device_map` has offloaded."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UsageError(
                f"{name} is offloaded, or the model has no weights: a model that the devices do not hold is pruned layer by "
                "layer, with --memory SIZE, or stream_statistics and prune_checkpoint"
            )


def spread(model: Any, places: Mapping[str, int | str | torch.device]) -> None:
    """Let `model`, which lies on the devices that `places` (a `hf_device_map`) names, run over them as accelerate does it."""
    from accelerate.hooks import attach_align_device_hook_on_blocks

    if len(set(places.values())) < 2:
        return
    devices = {name: torch.device(place) for name, place in places.items()}
    # hidden states go from device to device, and the result back to where the input was
    attach_align_device_hook_on_blocks(model, devices | {"": next(iter(devices.values()))}, dict.fromkeys(devices, False))
    model.hf_device_map = dict(places)


def trim() -> None:
    """Give back to the system what was freed among what is in use; the C library, glibc for one, keeps it otherwise."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def release() -> None:
    """Give back what is no longer used of a GPU's memory, so that another process finds it."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
