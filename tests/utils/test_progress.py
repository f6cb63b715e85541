"""Check what a log says of long work."""

from __future__ import annotations

import logging
import time

import pytest

from hf_gqaprune.utils import Progress, progress, track


def test_a_line_says_how_far_at_what_rate_and_how_long_yet() -> None:
    task = Progress("calibration", "batch", 1_000)
    task._start = time.monotonic() - 100
    assert task.line() == "calibration: 0 of 1,000 batches, 100 s"
    task.update(250)
    assert task.line() == "calibration: 250 of 1,000 batches, 2.5 batches/s, about 5 min 0 s left"
    slow = Progress("pruning", "layer", 32)
    slow._start = time.monotonic() - 60
    slow.update(2)
    assert slow.line() == "pruning: 2 of 32 layers, 30 s/layer, about 15 min 0 s left"
    open_end = Progress("search", "plan")
    open_end._start = time.monotonic() - 10
    open_end.update(40)
    assert open_end.line() == "search: 40 plans, 4 plans/s"


def test_a_log_gets_a_line_while_one_item_takes_long(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(progress, "_EVERY", 0.02)
    caplog.set_level(logging.INFO, "hf_gqaprune.utils.progress")
    for number in track([1, 2], "pruning", "layer"):
        if number == 2:
            deadline = time.monotonic() + 20
            while "1 of 2 layers" not in caplog.text and time.monotonic() < deadline:
                time.sleep(0.01)
    assert "pruning: 1 of 2 layers" in caplog.text


def test_short_work_says_nothing_and_a_failure_stops_the_thread(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hf_gqaprune.utils.progress")
    with pytest.raises(ZeroDivisionError):
        for _ in track(iter([1, 2]), "pruning", "layer", 2):
            raise ZeroDivisionError
    assert caplog.text == ""
