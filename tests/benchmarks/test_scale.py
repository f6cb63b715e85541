"""The scale benchmark on a tiny shape: what it reports is there and adds up."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import fit
import pytest
import scale
import stages


@pytest.mark.parametrize("measure", ["streamed", "in-memory"])
def test_stages_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], measure: str
) -> None:
    # in this process, which spares a start
    monkeypatch.setattr(scale, "in_a_process", lambda what, *arguments: scale.CHILDREN[what](*map(str, arguments)))
    out = tmp_path / "results.json"
    line = ["tiny", "--measure", measure, "--layers", "3", "--tokens", "100", "--seq-len", "32", "-o", str(out)]
    monkeypatch.setattr(sys, "argv", ["scale.py", *line, "--folder", str(tmp_path)])
    scale.main()
    found = json.loads(out.read_text())
    assert (found["measure"], found["layers"], found["tokens"]) == (measure, 3, 96)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert "3 layers, 96 tokens" in capsys.readouterr().out
    if measure == "streamed":
        parts = found["stages"]
        assert list(parts) == ["statistics", "plan", "prune"]
        assert found["seconds"] == pytest.approx(sum(stage["seconds"] for stage in parts.values()))
        assert parts["statistics"]["bytes_written"] > 0 < parts["prune"]["bytes_read"]
    else:
        assert set(found["seconds"]) == {"bare passes", "bare products", "statistics", "curves", "plan", "compensation"}
        assert found["ratio"] > 0 and 0 < found["share"] < 1


def test_killed_twice_the_files_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "results.json"
    line = ["tiny", "--measure", "killed", "--layers", "24", "--tokens", "4096", "--seq-len", "64", "-o", str(out)]
    monkeypatch.setattr(sys, "argv", ["scale.py", *line, "--folder", str(tmp_path)])
    scale.main()
    found = json.loads(out.read_text())
    # so many layers that half of a stage is no matter of milliseconds: curves and moments of 48 blocks, the head of the statistics, the windows, and a checkpoint
    assert found["different"] == [] and found["files"] > 10
    assert found["seconds"]["killed twice"] > found["seconds"]["in one go"]
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_the_curves_are_timed_by_what_is_put_back(tmp_path: Path) -> None:
    real = stages.collect.MomentHooks.statistics
    seconds: dict[str, float] = {}
    with pytest.raises(ZeroDivisionError), stages._curves(seconds):
        assert stages.collect.MomentHooks.statistics is not real
        raise ZeroDivisionError
    assert stages.collect.MomentHooks.statistics is real and seconds == {"curves": 0.0}


def test_exponents_are_slopes_of_logarithms() -> None:
    assert fit.exponent([1, 2, 4], [3, 6, 12]) == pytest.approx(1)
    assert fit.exponent([10, 20, 40], [5, 20, 80]) == pytest.approx(2)
    assert fit.exponent([1, 2, 4], [7, 7, 7]) == pytest.approx(0)


def test_a_line_has_what_is_fixed_and_what_is_not() -> None:
    assert fit.line([1, 2, 4], [7, 9, 13]) == pytest.approx({"fixed": 5, "each": 2, "off": 0})
    assert fit.line([0, 1, 2], [1, 1, 4])["off"] == pytest.approx(1)


def test_growth_is_fitted_over_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "in_a_process", lambda what, *arguments: scale.CHILDREN[what](*map(str, arguments)))
    out = tmp_path / "results.json"
    line = ["tiny", "--layers", "1", "2", "--tokens", "64", "--seq-len", "32", "-o", str(out), "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["fit.py", *line])
    fit.main()
    found = json.loads(out.read_text())
    assert [run["layers"] for run in found["runs"]] == [1, 2] and set(found["layers"]) == {"statistics", "prune", "all"}
    assert set(found["lines"]) == set(found["layers"])
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_what_a_shape_needs_is_computed_without_its_weights() -> None:
    found = fit.needs("tiny", 4, 16)
    before, after = found["parameters"]
    assert after < before and found["tokens"] == 64
    assert found["memory"][1] >= found["memory_without_refit"][1] > 0 < found["disk"]
