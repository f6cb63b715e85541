"""What pruning costs a model that people use: perplexity, divergence and seconds of every stage, a JSON line per cell.

    python benchmarks/real_model.py --model MODEL --calibration TEXT... --test TEXT... --device cuda --minutes 10 -o real.jsonl

Cells come in the order of `--ratios`; what the file holds already is not measured again, and none is begun after
`--minutes`. A cell that fails is written down with its error, and the next one is measured.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics as summary
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from quality import removed_share
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_gqaprune as gp
from hf_gqaprune.compensation.natural_gradient import natural_gradient_steps
from hf_gqaprune.data import load_text
from hf_gqaprune.evaluation import evaluate_perplexity, versions
from hf_gqaprune.models import eval_without_grad

Cell = dict[str, Any]


@dataclass
class Bench:
    """A dense model, the windows it is pruned on, the texts it is judged by, and what the file holds.

    Attributes:
        settings: what has to be the same for cells of one file.
        until: no cell is begun after this `time.monotonic()`.
    """

    model: Any
    tokenizer: Any
    calibration: gp.Calibration
    texts: list[Any]
    path: Path
    settings: Cell
    until: float
    cells: dict[str, Cell] = field(default_factory=dict)

    def read(self) -> None:
        """Take over what the file holds; a line that was cut off does not count."""
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            try:
                cell = json.loads(line)
            except json.JSONDecodeError:
                continue
            if cell["settings"] != self.settings:
                raise SystemExit(f"{self.path} was measured with other settings: choose another --output")
            if "error" not in cell:
                self.cells[cell["cell"]] = cell

    def measure(self, name: str, work: Callable[[], Cell]) -> Cell | None:
        """The cell of this name, measured unless it is there; None where time is up or it failed."""
        if name in self.cells:
            return self.cells[name]
        if time.monotonic() > self.until:
            print(f"{name}: no time left", flush=True)
            return None
        start = self.now()
        try:
            cell = work()
        except Exception:  # noqa: BLE001  (one cell less is no reason to lose the others)
            cell = {"error": traceback.format_exc()}
        cell = {"cell": name, **cell, "whole_seconds": round(self.now() - start, 1), "settings": self.settings}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(cell) + "\n")
        print(json.dumps({key: value for key, value in cell.items() if key != "settings"}), flush=True)
        if "error" in cell:
            return None
        self.cells[name] = cell
        return cell

    def now(self) -> float:
        """Seconds, everything that was asked of the device done."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def perplexities(self, model: Any) -> dict[str, float]:
        """Of each text."""
        length = self.settings["seq_len"]
        found = (evaluate_perplexity(model, self.tokenizer, text, seq_len=length, drop_tail=True) for text in self.texts)
        return {result.dataset: result.value for result in found}

    def judged(self, model: Any) -> Cell:
        """Pruned / dense of each text and their geometric mean."""
        dense = self.cells["dense"]["perplexity"]
        ratios = {name: value / dense[name] for name, value in self.perplexities(model).items()}
        return {
            "removed": removed_share(self.model, model),
            "ratios": ratios,
            "geometric_mean": summary.geometric_mean(ratios.values()),
        }


def ratio_cells(bench: Bench, statistics: gp.Statistics, ratio: float) -> None:
    """The re-fitted model of a share that goes, then the same with the steps."""
    pruned: list[Any] = []

    def refitted() -> Cell:
        start = bench.now()
        plan = gp.make_plan(statistics, backbone_ratio=ratio)
        planned = bench.now()
        pruned.append(gp.prune(bench.model, plan, statistics, compensation="least_squares"))
        seconds = {"plan": planned - start, "least_squares": bench.now() - planned}
        return {"ratio": ratio, "seconds": seconds, **bench.judged(pruned[0])}

    def stepped() -> Cell:
        if not pruned:
            plan = gp.make_plan(statistics, backbone_ratio=ratio)
            pruned.append(gp.prune(bench.model, plan, statistics, compensation="least_squares"))
        model = copy.deepcopy(pruned[0])
        start = bench.now()
        with eval_without_grad(bench.model):
            passes = natural_gradient_steps(bench.model, model, bench.calibration)
        seconds = {"steps": bench.now() - start}
        return {"ratio": ratio, "seconds": seconds, "passes": [asdict(step) for step in passes], **bench.judged(model)}

    bench.measure(f"least_squares/{ratio}", refitted)
    bench.measure(f"natural_gradient/{ratio}", stepped)


def table(cells: dict[str, Cell]) -> str:
    """Markdown: pruned / dense of each text, their geometric mean, and seconds of the stage."""
    found = [cell for cell in cells.values() if "ratios" in cell]
    if not found:
        return ""
    texts = list(found[0]["ratios"])
    lines = [
        "| compensation | backbone removed | " + " | ".join(texts) + " | geometric mean | seconds |",
        "|---|---:|" + "---:|" * (len(texts) + 2),
    ]
    for cell in sorted(found, key=lambda cell: (cell["ratio"], cell["cell"])):
        values = " | ".join(f"{value:.4f}" for value in (*cell["ratios"].values(), cell["geometric_mean"]))
        seconds = sum(cell["seconds"].values())
        lines.append(f"| {cell['cell'].partition('/')[0]} | {cell['ratio']:.0%} | {values} | {seconds:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--test", nargs="+", required=True)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.2, 0.35, 0.1, 0.5])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--max-chars", type=int, default=300_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    until = time.monotonic() + 60 * args.minutes
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device).eval()
    calibration = gp.Calibration.from_text(
        tokenizer, args.calibration, samples=args.samples, seq_len=args.seq_len, seed=args.seed
    )
    texts = [load_text(name, split="test", max_chars=args.max_chars) for name in args.test]
    settings: Cell = {name: getattr(args, name) for name in ("samples", "seq_len", "max_chars", "seed")}
    settings |= {
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu",
        "calibration": [Path(name).name for name in args.calibration],
        "versions": versions(),
    }
    bench = Bench(model, tokenizer, calibration, texts, args.output, settings, until)
    bench.read()
    bench.measure("dense", lambda: {"perplexity": bench.perplexities(model)})
    if "dense" not in bench.cells:
        raise SystemExit("the dense model could not be measured")
    wanted = [r for r in args.ratios if not {f"least_squares/{r}", f"natural_gradient/{r}"} <= set(bench.cells)]
    if wanted:
        measured: list[gp.Statistics] = []
        # statistics are no cell that a later call could take from the file
        bench.cells.pop("statistics", None)
        bench.measure("statistics", lambda: measured.append(gp.collect_statistics(model, calibration)) or {})
        for ratio in wanted if measured else ():
            ratio_cells(bench, measured[0], ratio)
    print(table(bench.cells))


if __name__ == "__main__":
    main()
