"""Show how far long work is: a bar in a terminal, a line every half minute in a log."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

T = TypeVar("T")
#: seconds between two lines of a log
_EVERY = 30.0


class Progress:
    """Count finished units of one task; a context manager."""

    def __init__(self, task: str, unit: str, total: int | None = None) -> None:
        """Name the task.

        Args:
            task: such as `calibration`.
            unit: what is counted, in the singular.
            total: how many there are; None if unknown.
        """
        self.task, self.unit, self.total, self.done = task, unit, total, 0
        self._units = f"{unit}es" if unit.endswith("ch") else f"{unit}s"
        self._start = time.monotonic()
        self._ended = threading.Event()
        self._bar: Any = None
        # a thread, since one unit of a large model may take longer than a line should wait
        self._thread = threading.Thread(target=self._log, daemon=True)

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            self._bar = tqdm(total=self.total, desc=self.task, unit=self.unit, delay=2, leave=False, dynamic_ncols=True)
        else:
            self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._ended.set()
        if self._bar is not None:
            self._bar.close()
        else:
            self._thread.join()

    def update(self, units: int = 1) -> None:
        """Count `units` more."""
        self.done += units
        if self._bar is not None:
            self._bar.update(units)

    def line(self) -> str:
        """Say in one line how far the task is, at what rate, and how long the rest will take at that rate."""
        seconds = time.monotonic() - self._start
        told = f"{self.task}: {self.done:,}" + (f" of {self.total:,}" if self.total else "") + f" {self._units}"
        if not self.done:
            return f"{told}, {seconds:.0f} s"
        rate = self.done / seconds
        speed = f"{rate:.3g} {self._units}/s" if rate >= 1 else f"{1 / rate:.3g} s/{self.unit}"
        rest = f", about {_duration((self.total - self.done) / rate)} left" if self.total else ""
        return f"{told}, {speed}{rest}"

    def _log(self) -> None:
        while not self._ended.wait(_EVERY):
            logger.info(self.line())


def track(items: Iterable[T], task: str, unit: str, total: int | None = None) -> Iterator[T]:
    """Yield `items` and show how many are finished; `total` is their number where it cannot be asked."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(task, unit, total) as progress:
        for item in items:
            yield item
            progress.update()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:.0f} s" if minutes else f"{seconds:.0f} s"
