"""Calibration in two real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from support.tiny import tiny_config, tiny_llama

from hf_gqaprune import PruningPlan
from hf_gqaprune.cli import main

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_measure_what_one_does() -> None:
    run([*TORCHRUN, str(Path(__file__).parents[1] / "support" / "ranks_worker.py")])


def test_the_command_under_accelerate_launch_writes_once(tmp_path: Path, tokenizer: Any) -> None:
    tiny_llama(tiny_config(layers=2, vocab_size=len(tokenizer))).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (4000,), generator=generator).tolist()
    (tmp_path / "text.txt").write_text(bytes(letters).decode())
    arguments = [
        "prune", str(tmp_path / "dense"), "--backbone-ratio", "0.3", "--calibration", str(tmp_path / "text.txt"),
        "--samples", "20", "--seq-len", "16",
    ]  # fmt: skip
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "hf_gqaprune"]
    printed = run([*launch, *arguments, "-o", str(tmp_path / "two")])
    assert printed.count("written to") == 1
    assert main([*arguments, "-o", str(tmp_path / "one")]) == 0
    plans = [PruningPlan.load(tmp_path / name / "prune_plan.json") for name in ("one", "two")]
    assert plans[0].layers == plans[1].layers
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == sorted(p.name for p in (tmp_path / "two").iterdir())
