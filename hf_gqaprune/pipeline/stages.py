"""Time the stages of a command."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


@contextmanager
def timed(stage: str) -> Iterator[None]:
    """Log at INFO how many seconds `stage` takes."""
    start = time.perf_counter()
    yield
    logger.info("%s: %.1f s", stage, time.perf_counter() - start)
