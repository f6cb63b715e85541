"""Fit the cost of layer-by-layer pruning to layers and tokens, and extrapolate it to larger shapes.

    python benchmarks/fit.py small --layers 4 8 16 --tokens 8192 -o layers.json
    python benchmarks/fit.py small --layers 4 --tokens 4096 8192 16384 32768 --seq-len 512 -o tokens.json
    python benchmarks/fit.py llama-3-70b --needs -o needs.json

Two fits: an exponent, the slope of the least-squares line through log seconds over log size; and the line itself, seconds =
fixed + each * size, with the largest relative distance of a run from it. What costs the same at any size, such as the
greedy removal at any number of tokens, makes the first less than 1 where the second is exact. Windows have `--seq-len`
tokens; below 8 windows none is held out. `--needs` plans on the meta device, and computes memory and disk as `--memory`
does before it begins.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scale import BACKBONE_RATIO, in_a_process
from shapes import SHAPES, make_checkpoint
from transformers import LlamaConfig

import hf_gqaprune as gp
from hf_gqaprune.evaluation.report import versions
from hf_gqaprune.models.shapes import ModelShape
from hf_gqaprune.statistics.criteria import CRITERIA
from hf_gqaprune.streaming.memory_bound import Workload
from hf_gqaprune.streaming.statistics import statistics_disk_bytes as room
from hf_gqaprune.utils.files import write_json


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of log seconds over log size."""
    return statistics.linear_regression([*map(math.log, sizes)], [*map(math.log, seconds)]).slope


def line(sizes: Sequence[float], seconds: Sequence[float]) -> dict[str, float]:
    """Seconds that are fixed, seconds for each unit of size, and by how much of it a run is off at most."""
    found = statistics.linear_regression(sizes, seconds)
    fitted = (found.intercept + found.slope * size for size in sizes)
    off = max(abs(guess / actual - 1) for guess, actual in zip(fitted, seconds, strict=True))
    return {"fixed": found.intercept, "each": found.slope, "off": off}


def measure(shape: str, layers: int, tokens: int, seq_len: int, folder: Path | None) -> dict[str, float]:
    """Seconds of each stage, layer by layer, on a checkpoint that is made for it."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        made = Path(name)
        make_checkpoint(shape, made / "dense", layers=layers)
        (made / "scratch").mkdir()
        found = in_a_process("streamed", made / "dense", made / "scratch", tokens, seq_len, "cpu", "80GiB")
    return {stage: values["seconds"] for stage, values in found["stages"].items()} | {"all": found["seconds"]}


def needs(shape: str, windows: int, seq_len: int) -> dict[str, Any]:
    """Seconds to plan a model of this shape without weights; bytes of memory and disk to prune it layer by layer."""
    config = LlamaConfig(**SHAPES[shape])
    sizes = ModelShape.from_config(config)
    with tempfile.TemporaryDirectory() as name:
        config.save_pretrained(name)
        start = time.perf_counter()
        plan = gp.make_plan(model=name, backbone_ratio=BACKBONE_RATIO, criterion="random")
        seconds = time.perf_counter() - start
    rule = CRITERIA["curvature"]
    work = Workload(sizes, 2, windows, seq_len, rule, refitted=True)
    calibration = gp.Calibration.from_ids(torch.zeros(windows, seq_len, dtype=torch.long))
    return {
        "plan_seconds": seconds,
        "parameters": [plan.before.parameters, plan.after.parameters],
        "tokens": windows * seq_len,
        "memory": work.peak(),
        "memory_without_refit": replace(work, refitted=False).peak(),
        "disk": room(sizes, torch.bfloat16, calibration, rule),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--layers", nargs="+", type=int, default=[4])
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192])
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--folder", type=Path, help="where the checkpoints are written")
    parser.add_argument("--needs", action="store_true", help="compute instead of measuring")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file of the results")
    args = parser.parse_args()
    if args.needs:
        found = needs(args.shape, 128, 2048)
        print(json.dumps(found, indent=2))
        write_json(args.output, {"shape": args.shape, **found, "versions": versions()})
        return
    grown = "layers" if len(args.layers) > 1 else "tokens"
    runs = []
    for layers in args.layers:
        for tokens in args.tokens:
            seconds = measure(args.shape, layers, tokens, args.seq_len, args.folder)
            runs.append({"layers": layers, "tokens": tokens, "seconds": seconds})
            print(f"{layers} layers, {tokens:,} tokens:", {k: round(v, 1) for k, v in seconds.items()}, flush=True)
    sizes = [run[grown] for run in runs]
    by_stage = {stage: [run["seconds"][stage] for run in runs] for stage in ("statistics", "prune", "all")}
    slopes = {stage: exponent(sizes, seconds) for stage, seconds in by_stage.items()}
    lines = {stage: line(sizes, seconds) for stage, seconds in by_stage.items()}
    print(f"seconds grow with {grown} to the power of", {stage: round(slope, 2) for stage, slope in slopes.items()})
    for stage, found in lines.items():
        print(f"{stage}: {found['fixed']:.1f} s + {found['each']:.4g} s x {grown}, off by at most {found['off']:.0%}")
    write_json(args.output, {"shape": args.shape, "runs": runs, grown: slopes, "lines": lines, "versions": versions()})


if __name__ == "__main__":
    main()
