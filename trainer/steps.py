"""Plan how training rows become optimizer steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import UsageError
from .request import Request


@dataclass(frozen=True)
class Steps:
    """Optimizer steps of `rows` per forward pass, `accumulation` passes, on `processes` at once."""

    rows: int
    accumulation: int
    processes: int
    per_epoch: int
    total: int

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step over all processes."""
        return self.rows * self.accumulation * self.processes


def plan_steps(request: Request, rows: int, processes: int) -> Steps:
    """Choose the step size nearest to `batch_tokens` that all processes share evenly; it is the same for 1 and 2 processes.

    Raises:
        UsageError: there are fewer rows than processes.
    """
    config, seq_len = request.config, request.config.seq_len or 1
    if rows < processes:
        raise UsageError(f"the training text makes {rows} rows for {processes} processes: give more text")
    wanted = min(max(1, (config.batch_tokens or seq_len) // seq_len), rows)
    # rounded down if the text holds no more rows
    share = min(math.ceil(wanted / processes), rows // processes)
    most = max(1, config.device_tokens // seq_len)
    device_rows = max(count for count in range(1, min(share, most) + 1) if share % count == 0)
    per_epoch = rows // (share * processes)
    return Steps(device_rows, share // device_rows, processes, per_epoch, per_epoch * config.epochs)
