"""Measure perplexity after recovery: trainings x ratios x texts for equal numbers of tokens, as a resumable table.

    python benchmarks/recovery.py MODEL --train TEXT... --test TEXT... -o RESULTS

Every cell is measured once and kept in RESULTS/recovery.json; a second call measures only what is missing. `--tokens`
counts what a way to train sees, repetitions included: block-wise reconstruction followed by distillation gets no more
than distillation alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_gqaprune as gp
from hf_gqaprune.configuration import CalibrationConfig, PruneRequest, PruningConfig, RecoveryConfig
from hf_gqaprune.data.text import load_text
from hf_gqaprune.evaluation.perplexity import evaluate_perplexity
from hf_gqaprune.evaluation.report import versions
from hf_gqaprune.pipeline.prune import prune_model
from hf_gqaprune.trainer.blockwise import EPOCHS, fit_blocks
from hf_gqaprune.trainer.models import lora_config
from hf_gqaprune.utils.files import write_json


@dataclass(frozen=True)
class Job:
    """One cell: what is trained, on what, and where the result may lie while it is measured."""

    start: Path
    dense: str
    train: tuple[str, ...]
    tokens: int
    seq_len: int
    seed: int
    folder: Path


def trained(job: Job, **changes: Any) -> Any:
    """The model that `recover` makes of `job.start`."""
    options = {"max_tokens": job.tokens, "seq_len": job.seq_len, "seed": job.seed, "overwrite": True, **changes}
    return AutoModelForCausalLM.from_pretrained(gp.recover(job.start, job.train, job.folder, **options))


def blockwise(job: Job) -> Any:
    """`job.start` after block-wise reconstruction alone, of adapters as the default preset has them."""
    from peft import get_peft_model

    windows = max(8, job.tokens // EPOCHS // job.seq_len)
    ids = gp.Calibration.from_text(
        AutoTokenizer.from_pretrained(job.start), job.train, samples=windows, seq_len=job.seq_len, seed=job.seed
    ).ids
    torch.manual_seed(job.seed)
    base = AutoModelForCausalLM.from_pretrained(job.start)
    model = get_peft_model(base, lora_config(base, RecoveryConfig.from_preset()))
    fit_blocks(model, AutoModelForCausalLM.from_pretrained(job.dense), ids, rows=16, seed=job.seed)
    return model.merge_and_unload()


WAYS: dict[str, Callable[[Job], Any]] = {
    "pruned": lambda job: AutoModelForCausalLM.from_pretrained(job.start),
    "SFT, LoRA": trained,
    "KD, LoRA": lambda job: trained(job, teacher=job.dense),
    "KD, all weights": lambda job: trained(job, teacher=job.dense, method="full"),
    "block-wise": blockwise,
    "block-wise, then KD, LoRA": lambda job: trained(
        job, teacher=job.dense, blockwise_tokens=job.tokens // 4, max_tokens=job.tokens - job.tokens // 4
    ),
}
#: the dense model given the same training: what the text alone is worth
CONTROL = "dense, SFT, LoRA"


def table(cells: dict[str, dict[str, Any]]) -> str:
    """Markdown: perplexity divided by that of the dense model, per text."""
    texts = list(next(iter(cells.values()))["ratios"])
    lines = ["| backbone removed | recovery | " + " | ".join(texts) + " |", "|---:|---|" + "---:|" * len(texts)]
    order = [CONTROL, *WAYS]
    for cell in sorted(cells.values(), key=lambda cell: (cell["ratio"], order.index(cell["way"]))):
        values = " | ".join(f"{cell['ratios'][text]:.4f}" for text in texts)
        lines.append(f"| {cell['ratio']:.0%} | {cell['way']} | {values} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--train", nargs="+", required=True, help="text to calibrate and to train on")
    parser.add_argument("--test", nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.35, 0.5])
    parser.add_argument("--ways", nargs="+", choices=[CONTROL, *WAYS], default=[CONTROL, *WAYS])
    parser.add_argument("--samples", type=int, default=1536)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--max-chars", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "recovery.json"
    cells = json.loads(path.read_text())["cells"] if path.exists() else {}
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = [load_text(name, split="test", max_chars=args.max_chars) for name in args.test]

    def perplexities(model: Any) -> dict[str, float]:
        scored = (evaluate_perplexity(model, tokenizer, text, seq_len=args.seq_len) for text in texts)
        return {result.dataset: result.value for result in scored}

    dense = perplexities(AutoModelForCausalLM.from_pretrained(args.model))
    settings = {name: getattr(args, name) for name in ("tokens", "samples", "seq_len", "max_chars", "seed")}

    def measure(ratio: float, way: str, start: Path, run: Callable[[Job], Any]) -> None:
        key = f"{ratio}/{way}"
        if key in cells:
            return
        folder = args.output / "recovered"
        job = Job(start, args.model, tuple(args.train), args.tokens, args.seq_len, args.seed, folder)
        ratios = {name: value / dense[name] for name, value in perplexities(run(job)).items()}
        shutil.rmtree(folder, ignore_errors=True)
        cells[key] = {"way": way, "ratio": ratio, "ratios": ratios}
        write_json(path, {"settings": settings, "dense": dense, "cells": cells, "versions": versions()})
        print(key, {name: round(value, 4) for name, value in ratios.items()}, flush=True)

    if CONTROL in args.ways:
        measure(0.0, CONTROL, Path(args.model), trained)
    for ratio in args.ratios:
        pruned = args.output / f"pruned-{ratio}"
        if not pruned.exists():
            request = PruneRequest(
                args.model, PruningConfig(backbone_ratio=ratio),
                CalibrationConfig(args.train, args.samples, args.seq_len), args.seed,
            )  # fmt: skip
            prune_model(request, pruned)
        for way, run in WAYS.items():
            if way in args.ways:
                measure(ratio, way, pruned, run)
    (args.output / "recovery.md").write_text(table(cells) + "\n", encoding="utf-8")
    print(table(cells))


if __name__ == "__main__":
    main()
