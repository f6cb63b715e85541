"""Shard calibration windows over processes and sum over them; with one process nothing is done.

After `torch.distributed.init_process_group`, or with an `accelerate.PartialState` under `accelerate launch`, every process
gets the same sums, plans and weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from accelerate import PartialState


def process_state() -> PartialState:
    """Return accelerate's state of this process, one of several under `accelerate launch`."""
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


def init() -> torch.device | None:
    """Join the process group of `accelerate launch` and return this process's device; None outside of one."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    device: torch.device = process_state().device
    return device


def count() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def index() -> int:
    """Return the rank of this process."""
    return dist.get_rank() if count() > 1 else 0


def shard(windows: torch.Tensor) -> torch.Tensor:
    """Return this process's rows of `windows`: every n-th for n processes, possibly none."""
    return windows[index() :: count()]


def all_reduce_(tensors: Iterable[torch.Tensor]) -> None:
    """Sum each tensor over all processes, in place."""
    if count() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def all_reduce_scalar(value: float, like: torch.Tensor) -> float:
    """Sum a number over all processes in float64, on the device of `like`."""
    if count() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=like.device)
    dist.all_reduce(total)
    return float(total)


def barrier() -> None:
    """Wait for all processes."""
    if count() > 1:
        dist.barrier()
