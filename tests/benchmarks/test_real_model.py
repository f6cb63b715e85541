"""The benchmark on a real model: cells are measured once, failures are written down, time is kept."""

import json
import math
import time

import pytest
from real_model import Bench, ratio_cells, table
from support.tiny import tiny_llama, token_ids

import hf_gqaprune as gp


@pytest.fixture
def bench(tmp_path):
    model = tiny_llama(layers=2, ffn=24)
    windows = gp.Calibration.from_ids(token_ids(16, 12))
    return Bench(model, None, windows, [], tmp_path / "cells.jsonl", {"seed": 0}, math.inf)


def test_cells_are_measured_once_and_read_again(bench):
    calls = []
    for _ in range(2):
        assert bench.measure("one", lambda: calls.append(1) or {"value": 3})["value"] == 3
    assert calls == [1]
    # a line that was cut off is measured again
    with bench.path.open("a") as file:
        file.write('{"cell": "two", "val')
    again = Bench(bench.model, None, bench.calibration, [], bench.path, {"seed": 0}, math.inf)
    again.read()
    assert list(again.cells) == ["one"]
    other = Bench(bench.model, None, bench.calibration, [], bench.path, {"seed": 1}, math.inf)
    with pytest.raises(SystemExit, match="other settings"):
        other.read()


def test_a_cell_that_fails_is_written_down_and_one_without_time_is_not_begun(bench):
    assert bench.measure("bad", lambda: {"value": 1 / 0}) is None
    assert "ZeroDivisionError" in json.loads(bench.path.read_text())["error"]
    bench.until = time.monotonic() - 1
    assert bench.measure("late", lambda: {"value": 1}) is None
    assert len(bench.path.read_text().splitlines()) == 1


def test_the_steps_begin_where_the_re_fit_ends(bench, monkeypatch):
    # no text is at hand: what would be judged is the sum of the weights
    monkeypatch.setattr(Bench, "judged", lambda self, model: {
        "ratios": {"text": 2.0}, "geometric_mean": 2.0, "sum": sum(float(p.detach().sum()) for p in model.parameters()),
    })  # fmt: skip
    statistics = gp.collect_statistics(bench.model, bench.calibration)
    ratio_cells(bench, statistics, 0.3)
    refitted, stepped = (bench.cells[f"{name}/0.3"] for name in ("least_squares", "natural_gradient"))
    plan = gp.make_plan(statistics, backbone_ratio=0.3)
    for cell in (refitted, stepped):
        pruned = gp.prune(bench.model, plan, statistics, compensation=cell["cell"].partition("/")[0])
        assert cell["sum"] == pytest.approx(sum(float(p.detach().sum()) for p in pruned.parameters()), rel=1e-6)
    assert stepped["passes"] == pruned.compensation_record["passes"]
    assert "| natural_gradient | 30% | 2.0000 | 2.0000 |" in table(bench.cells)
