"""Check that the dtype that is computed in changes neither the stored dtype nor the agreement of the two paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_gqaprune as gp
from hf_gqaprune.cli import main

TEXT = "one two three four five six seven eight nine ten, and so it goes on. " * 60


@pytest.fixture
def half(tmp_path: Path, llama: Any, tokenizer: Any) -> Path:
    """A bfloat16 checkpoint, and text.txt beside it."""
    llama.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "half")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "half"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streamed_and_in_memory_agree_and_the_result_is_stored_as_it_was(half: Path, tmp_path: Path, dtype: str) -> None:
    sizes = ["--calibration", str(tmp_path / "text.txt"), "--samples", "16", "--seq-len", "32", "--dtype", dtype]
    line = ["prune", str(half), "--ratio", "0.2", "--compensation", "least_squares", *sizes]
    assert main([*line, "-o", str(tmp_path / "one")]) == 0
    assert main([*line, "--memory", "2GiB", "-o", str(tmp_path / "two")]) == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and {tensor.dtype for tensor in one.values()} == {torch.bfloat16}
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
    plans = [(tmp_path / name / "prune_plan.json").read_bytes() for name in ("one", "two")]
    assert plans[0] == plans[1] and json.loads(plans[0])["source"]["dtype"] == "bfloat16"
    notes = [json.loads((tmp_path / name / "gqaprune.json").read_text()) for name in ("one", "two")]
    assert notes[0]["ridges"] == notes[1]["ridges"] != {}


def test_statistics_measured_in_one_dtype_serve_the_other(half: Path, tmp_path: Path) -> None:
    sizes = ["--calibration", str(tmp_path / "text.txt"), "--samples", "16", "--seq-len", "32"]
    statistics = str(tmp_path / "statistics")
    line = ["plan", str(half), "--ratio", "0.2", *sizes, "--dtype", "float32", "--save-statistics", statistics]
    assert main([*line, "-o", str(tmp_path / "plan.json")]) == 0
    line = ["prune", str(half), "--ratio", "0.2", "--statistics", statistics, "--dtype", "bfloat16"]
    assert main([*line, "-o", str(tmp_path / "out")]) == 0
    assert gp.PruningPlan.load(tmp_path / "out" / "prune_plan.json") == gp.PruningPlan.load(tmp_path / "plan.json")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_computing_in_float32_is_pruning_the_float32_model(half: Path, tmp_path: Path) -> None:
    sizes = ["--calibration", str(tmp_path / "text.txt"), "--samples", "16", "--seq-len", "32"]
    line = ["--ratio", "0.2", "--compensation", "least_squares", *sizes, "--dtype", "float32"]
    model = AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32)
    model.save_pretrained(tmp_path / "wide")
    for file in half.glob("tokenizer*"):
        (tmp_path / "wide" / file.name).write_bytes(file.read_bytes())
    for name in ("half", "wide"):
        assert main(["prune", str(tmp_path / name), *line, "-o", str(tmp_path / f"{name}-pruned")]) == 0
    stored, wide = (load_file(tmp_path / f"{name}-pruned" / "model.safetensors") for name in ("half", "wide"))
    for name, tensor in wide.items():
        assert torch.equal(stored[name], tensor.to(torch.bfloat16)), name
