"""Data-parallel calibration: every process takes its windows, and sums are summed over processes.

With one process nothing happens here. Whoever has called `torch.distributed.init_process_group`, or made an
`accelerate.PartialState` under `accelerate launch`, gets the same sums, plans and weights in every process.
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
    """Join the other processes of an `accelerate launch`; the device of this one, None where it is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    device: torch.device = process_state().device
    return device


def count() -> int:
    """Processes that take part."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def index() -> int:
    """This process, from 0."""
    return dist.get_rank() if count() > 1 else 0


def shard(windows: torch.Tensor) -> torch.Tensor:
    """The rows of `windows` that this process takes: every n-th of n processes, possibly none."""
    return windows[index() :: count()]


def all_reduce_(tensors: Iterable[torch.Tensor]) -> None:
    """Sum each tensor over all processes, in place."""
    if count() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def all_reduce_scalar(value: float, like: torch.Tensor) -> float:
    """A number summed over all processes, float64; `like` names a device that they can exchange from."""
    if count() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=like.device)
    dist.all_reduce(total)
    return float(total)


def barrier() -> None:
    """Until all processes are here."""
    if count() > 1:
        dist.barrier()
