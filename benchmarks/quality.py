"""Measure perplexity after pruning without training: methods x ratios x texts x seeds, as a resumable table and a plot.

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
from typing import Any

import torch
from competitors import METHODS, SEEDLESS, Dense
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_gqaprune as gp
from hf_gqaprune.data.text import load_text
from hf_gqaprune.data.windows import split_batches
from hf_gqaprune.evaluation.perplexity import evaluate_perplexity
from hf_gqaprune.evaluation.report import versions
from hf_gqaprune.models.checks import eval_without_grad
from hf_gqaprune.utils.files import write_json

Cell = dict[str, Any]


def grouped(cells: dict[str, Cell]) -> dict[tuple[str, float], list[Cell]]:
    """`{(method, ratio): one cell per seed}`, by ratio, then in the order of `METHODS`."""
    groups: dict[tuple[str, float], list[Cell]] = {}
    order = list(METHODS)
    for cell in sorted(cells.values(), key=lambda cell: (cell["ratio"], order.index(cell["method"]), cell["seed"])):
        groups.setdefault((cell["method"], cell["ratio"]), []).append(cell)
    return groups


def geometric_mean(cell: Cell) -> float:
    """Of pruned / dense over the texts."""
    return summary.geometric_mean(cell["ratios"].values())


def table(cells: dict[str, Cell]) -> str:
    """Markdown: medians over seeds of pruned / dense, per text and of the geometric means, and the range of the latter.

    With n seeds the range covers the median of the method with probability 1 - 2^(1 - n).
    """
    texts = list(next(iter(cells.values()))["ratios"])
    lines = [
        "| method | backbone removed | " + " | ".join(texts) + " | geometric mean | over seeds |",
        "|---|---:|" + "---:|" * (len(texts) + 2),
    ]
    for (method, ratio), found in grouped(cells).items():
        medians = [summary.median(cell["ratios"][text] for cell in found) for text in texts]
        means = [geometric_mean(cell) for cell in found]
        values = " | ".join(f"{value:.4f}" for value in (*medians, summary.median(means)))
        removed = summary.median(cell["removed"] for cell in found)
        span = f"{min(means):.4f} to {max(means):.4f} ({len(means)})" if len(means) > 1 else "1"
        share = f"{ratio:.0%}" if abs(removed - ratio) < 5e-3 else f"{ratio:.0%} ({removed:.1%})"
        lines.append(f"| {method} | {share} | {values} | {span} |")
    return "\n".join(lines)


def plot(cells: dict[str, Cell], path: Path) -> None:
    """Geometric mean of pruned / dense against the share removed, one line per method, its range over seeds shaded."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for method in METHODS:
        points = [
            (summary.median(cell["removed"] for cell in found), [geometric_mean(cell) - 1 for cell in found])
            for (name, _), found in grouped(cells).items()
            if name == method
        ]
        if points:
            removed = [100 * x for x, _ in points]
            (line,) = axes.plot(removed, [summary.median(y) for _, y in points], marker="o", label=method)
            axes.fill_between(
                removed, [min(y) for _, y in points], [max(y) for _, y in points], color=line.get_color(), alpha=0.2
            )
    axes.set_yscale("log")
    axes.set(xlabel="% of the backbone removed", ylabel="perplexity / dense - 1", title="after pruning, no training")
    axes.legend(fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def bare_pass(model: Any, calibration: gp.Calibration) -> float:
    """Seconds of forward and backward over the calibration windows with nothing measured."""
    start = time.perf_counter()
    with eval_without_grad(model):
        for ids in split_batches(calibration.ids, model.config.vocab_size):
            embeds = model.get_input_embeddings()(ids).detach().requires_grad_(True)
            logits = model(inputs_embeds=embeds, use_cache=False).logits
            F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum").backward()
    return time.perf_counter() - start


def removed_share(model: Any, pruned: Any) -> float:
    """Fraction of the decoder layers' parameters that are gone, added biases counted."""
    before, after = (sum(p.numel() for p in m.get_decoder().layers.parameters()) for m in (model, pruned))
    return 1 - after / before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--test", nargs="+", required=True)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.1, 0.2, 0.35, 0.5, 0.65])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=1536)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--max-chars", type=int)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "quality.json"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    texts = [load_text(name, split="test", max_chars=args.max_chars) for name in args.test]

    def perplexities(of: torch.nn.Module) -> dict[str, float]:
        scored = (evaluate_perplexity(of, tokenizer, text, seq_len=args.seq_len, drop_tail=True) for text in texts)
        return {result.dataset: result.value for result in scored}

    dense = perplexities(model)
    settings = {name: getattr(args, name) for name in ("samples", "seq_len", "max_chars")}
    settings["calibration"] = [Path(name).name for name in args.calibration]
    results: dict[str, Any] = {"settings": settings, "dense": dense, "timing": {}, "cells": {}, "versions": versions()}
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        same = all(math.isclose(found["dense"].get(text, 0), value) for text, value in dense.items())
        if found["settings"] != settings or not same:
            parser.error(f"{path} was measured with other settings, texts or weights: choose another --output")
        results |= {"timing": found["timing"], "cells": found["cells"]}
    cells = results["cells"]

    for seed in args.seeds:
        calibration = gp.Calibration.from_text(
            tokenizer, args.calibration, samples=args.samples, seq_len=args.seq_len, seed=seed
        )
        source = Dense(model, calibration)
        for method in args.methods:
            missing = [ratio for ratio in args.ratios if f"{method}/{ratio}/{seed}" not in cells]
            if not missing or (method in SEEDLESS and seed != args.seeds[0]):
                continue
            if method == "default":
                start = time.perf_counter()
                source.statistics("curvature")
                seconds = time.perf_counter() - start
                results["timing"][str(seed)] = {"statistics": seconds, "bare pass": bare_pass(model, calibration)}
                print({name: round(value, 1) for name, value in results["timing"][str(seed)].items()}, flush=True)
            for ratio in missing:
                start = time.perf_counter()
                pruned = METHODS[method](source, ratio)
                seconds = time.perf_counter() - start
                key = f"{method}/{ratio}/{seed}"
                ratios = {name: value / dense[name] for name, value in perplexities(pruned).items()}
                cells[key] = {
                    "method": method, "ratio": ratio, "removed": removed_share(model, pruned), "seed": seed,
                    "ratios": ratios, "seconds": round(seconds, 1),
                }  # fmt: skip
                write_json(path, results)
                print(key, {name: round(value, 4) for name, value in ratios.items()}, f"{seconds:.0f} s", flush=True)
    (args.output / "quality.md").write_text(table(cells) + "\n", encoding="utf-8")
    plot(cells, args.output / "quality.png")
    print(table(cells))


if __name__ == "__main__":
    main()
