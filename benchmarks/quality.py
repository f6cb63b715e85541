"""Perplexity right after pruning, no training: methods x ratios x texts x seeds, as a resumable table.

    python benchmarks/quality.py MODEL --calibration TEXT... --test TEXT... -o RESULTS

Every cell is measured once and kept in RESULTS/quality.json; a second call measures only what is missing.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics as summary
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_gqaprune as gp
from hf_gqaprune.evaluation import evaluate_perplexity
from hf_gqaprune.files import write_json
from hf_gqaprune.report import versions
from hf_gqaprune.text import load_text

#: name -> criterion, allocation, compensation
METHODS = {
    "default": ("curvature", "global", "least_squares"),
    "curvature, sliced only": ("curvature", "global", "none"),
    "Taylor, uniform (LLM-Pruner)": ("taylor", "uniform", "none"),
    "Taylor, uniform, re-fitted": ("taylor", "uniform", "least_squares"),
    "Taylor, global": ("taylor", "global", "none"),
    "Wanda-sp, uniform": ("wanda", "uniform", "none"),
    "magnitude, uniform": ("magnitude", "uniform", "none"),
}


def table(cells: dict[str, dict]) -> str:
    """Markdown: median over seeds of pruned / dense per text, and the geometric mean over texts."""
    texts = list(next(iter(cells.values()))["ratios"])
    lines = [
        "| method | backbone removed | " + " | ".join(texts) + " | geometric mean | seeds |",
        "|---|---:|" + "---:|" * (len(texts) + 2),
    ]
    groups: dict[tuple[str, float], list[dict]] = {}
    for cell in cells.values():
        groups.setdefault((cell["method"], cell["ratio"]), []).append(cell)
    for (method, ratio), found in sorted(groups.items(), key=lambda item: (item[0][1], list(METHODS).index(item[0][0]))):
        medians = [summary.median(cell["ratios"][text] for cell in found) for text in texts]
        mean = math.prod(medians) ** (1 / len(medians))
        values = " | ".join(f"{value:.4f}" for value in (*medians, mean))
        lines.append(f"| {method} | {ratio:.0%} | {values} | {len(found)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--test", nargs="+", required=True)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.2, 0.35, 0.5])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--samples", type=int, default=1536)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--max-chars", type=int)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "quality.json"
    cells = json.loads(path.read_text())["cells"] if path.exists() else {}
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    texts = [load_text(name, split="test", max_chars=args.max_chars) for name in args.test]

    def perplexities(of: torch.nn.Module) -> dict[str, float]:
        scored = (evaluate_perplexity(of, tokenizer, text, seq_len=args.seq_len, drop_tail=True) for text in texts)
        return {result.dataset: result.value for result in scored}

    dense = perplexities(model)
    for seed in args.seeds:
        calibration = gp.Calibration.from_text(
            tokenizer, args.calibration, samples=args.samples, seq_len=args.seq_len, seed=seed
        )
        measured: dict[str, gp.Statistics] = {}
        for method in args.methods:
            criterion, allocation, compensation = METHODS[method]
            for ratio in args.ratios:
                key = f"{method}/{ratio}/{seed}"
                if key in cells:
                    continue
                if criterion not in measured:
                    measured[criterion] = gp.collect_statistics(model, calibration, criterion=criterion)
                start = time.perf_counter()
                plan = gp.make_plan(measured[criterion], backbone_ratio=ratio, allocation=allocation)
                pruned = gp.prune(model, plan, measured[criterion], compensation=compensation)
                seconds = time.perf_counter() - start
                ratios = {name: value / dense[name] for name, value in perplexities(pruned).items()}
                cells[key] = {
                    "method": method, "ratio": ratio, "seed": seed, "ratios": ratios, "seconds": round(seconds, 1)
                }  # fmt: skip
                settings = {"samples": args.samples, "seq_len": args.seq_len, "max_chars": args.max_chars}
                write_json(path, {"settings": settings, "dense": dense, "cells": cells, "versions": versions()})
                print(key, {name: round(value, 4) for name, value in ratios.items()}, flush=True)
    (args.output / "quality.md").write_text(table(cells) + "\n", encoding="utf-8")
    print(table(cells))


if __name__ == "__main__":
    main()
