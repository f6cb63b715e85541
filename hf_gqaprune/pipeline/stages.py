"""Time the stages of a command."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


@contextmanager
def timed(stage: str, seconds: dict[str, float] | None = None) -> Iterator[None]:
    """Log at INFO how many seconds `stage` takes, and note it in `seconds`."""
    start = time.perf_counter()
    yield
    taken = round(time.perf_counter() - start, 1)
    logger.info("%s: %.1f s", stage, taken)
    if seconds is not None:
        seconds[stage] = taken
