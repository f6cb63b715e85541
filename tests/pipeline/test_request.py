"""Check that one command opens each part of a model once."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_gqaprune.checkpoint import ModelFolder
from hf_gqaprune.cli import main
from hf_gqaprune.compensation import steps_peak_bytes
from hf_gqaprune.errors import UsageError
from hf_gqaprune.models import LayerShape, ModelShape
from hf_gqaprune.pipeline import request

TEXT = "one two three four five six seven eight nine ten, and so it goes on. " * 60
SIZES = ["--samples", "8", "--seq-len", "32"]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """How often each part of each model folder was opened, and calibration windows were drawn."""
    counts: Counter[tuple[str, str]] = Counter()
    for part in ("config", "tokenizer", "tensors"):
        original = ModelFolder.__dict__[part].func

        def count(folder: ModelFolder, part: str = part, original: Any = original) -> Any:
            counts[folder.path.name, part] += 1
            return original(folder)

        counted = cached_property(count)
        counted.__set_name__(ModelFolder, part)
        monkeypatch.setattr(ModelFolder, part, counted)
    sample = request.sample_windows

    def drawn(*args: Any) -> Any:
        counts["calibration", "windows"] += 1
        return sample(*args)

    monkeypatch.setattr(request, "sample_windows", drawn)
    return counts


@pytest.mark.parametrize("extra", [[], ["--memory", "2GiB"]])
@pytest.mark.parametrize("verb", ["plan", "prune"])
def test_a_command_opens_each_part_once(
    dense: Path, tmp_path: Path, opened: Counter[tuple[str, str]], verb: str, extra: list[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    line = [verb, str(dense), "--ratio", "0.2", "--calibration", str(tmp_path / "text.txt"), *SIZES, *extra]
    assert main([*line, "-o", str(tmp_path / "out")]) == 0
    parts = [("dense", part) for part in ("config", "tokenizer", "tensors")]
    assert opened == dict.fromkeys([*parts, ("calibration", "windows")], 1)


def test_a_run_opens_each_part_of_each_checkpoint_once(
    dense: Path, tmp_path: Path, opened: Counter[tuple[str, str]]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "test.txt").write_text(TEXT[::-1])
    recipe = {
        "model": str(dense),
        "output": str(tmp_path / "out"),
        "calibration": {"data": [str(tmp_path / "text.txt")], "samples": 8, "seq_len": 32},
        "prune": {"ratio": 0.2, "compensation": "none", "criterion": "wanda"},
        "recover": None,
        "evaluate": {"data": [str(tmp_path / "test.txt")], "seq_len": 32},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["run", str(tmp_path / "recipe.yaml")]) == 0
    assert opened["calibration", "windows"] == 1
    assert max(opened.values()) == 1, opened


def test_steps_that_no_gpu_holds_are_refused_with_the_way_out() -> None:
    layer = LayerShape(query_heads=4, kv_heads=2, ffn=24, head_dim=4)
    shape = ModelShape(8, 100, False, False, False, "bfloat16", (layer,))
    # rows and columns of q, k, v, o, gate, up and down
    linears = [(16, 8), (8, 8), (8, 8), (8, 16), (24, 8), (24, 8), (8, 24)]
    floats = sum(3 * rows * columns + rows**2 + columns**2 for rows, columns in linears)
    assert steps_peak_bytes(shape) == 4 * floats
    needed = 2 * shape.cost.parameters + 4 * floats
    request.check_steps_memory(shape, shape, 2, needed)
    with pytest.raises(UsageError, match="natural_gradient take about 0 GiB, .* --compensation least_squares"):
        request.check_steps_memory(shape, shape, 2, needed - 1)
