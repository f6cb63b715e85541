"""Compare four ways to remove KV heads from a GQA model at equal sizes, before and after LoRA, in a table and a plot.

    python benchmarks/gqa_ablation.py MODEL --calibration TEXT... --test TEXT... -o RESULTS

`truncate`: KV heads chosen by importance; a removed KV row removes the query row of the same index, as plain
torch-pruning propagates it under sdpa; then the last query heads are cut until the ratio fits. `reselect`: the most
important query heads are kept instead, in their order. `group_mean`: whole KV groups, scored by the mean of their query
heads. `group`: whole KV groups, scored through the dependency graph. FFN channels are the same in all four.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_gqaprune as gp
from hf_gqaprune.data.text import Text, load_text
from hf_gqaprune.data.windows import split_batches
from hf_gqaprune.evaluation.perplexity import evaluate_perplexity
from hf_gqaprune.evaluation.report import versions
from hf_gqaprune.plan import LayerPlan, PruningPlan
from hf_gqaprune.utils.files import write_json

Heads = tuple[list[int], list[int]]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def head_scores(model: torch.nn.Module, calibration: gp.Calibration) -> list[dict[str, torch.Tensor]]:
    """Per layer and projection the first-order Taylor score sum |w * dL/dw| of every head, float64 `(heads,)`."""
    totals: dict[str, torch.Tensor] = {}
    for batch in split_batches(calibration.ids, model.config.vocab_size):
        logits = model(batch, use_cache=False).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").backward()
    scores = []
    for layer in model.model.layers:
        attention = layer.self_attn
        totals = {}
        for name in ATTENTION:
            weight = attention.get_submodule(name).weight
            saliency = (weight * weight.grad).abs().double().sum(0 if name == "o_proj" else 1).detach()
            totals[name] = saliency.view(-1, attention.head_dim).sum(1)
        scores.append(totals)
    model.zero_grad()
    return scores


def truncate(scores: dict[str, torch.Tensor], kept: int, n_rep: int) -> Heads:
    """Query heads of the removed KV indices go, then the last ones until the ratio fits."""
    groups = _best(scores["k_proj"] + scores["v_proj"], kept)
    removed = set(range(len(scores["k_proj"]))) - set(groups)
    left = [head for head in range(len(scores["q_proj"])) if head not in removed]
    return groups, left[: kept * n_rep]


def reselect(scores: dict[str, torch.Tensor], kept: int, n_rep: int) -> Heads:
    """The most important query heads, whatever KV head they read."""
    groups = _best(scores["k_proj"] + scores["v_proj"], kept)
    return groups, _best(scores["q_proj"] + scores["o_proj"], kept * n_rep)


def group_mean(scores: dict[str, torch.Tensor], kept: int, n_rep: int) -> Heads:
    """Whole groups by the mean score of their query heads."""
    return _whole((scores["q_proj"] + scores["o_proj"]).view(-1, n_rep).mean(1), kept, n_rep)


def group(scores: dict[str, torch.Tensor], kept: int, n_rep: int) -> Heads:
    """Whole groups by the sum over everything that the dependency graph ties together."""
    query = (scores["q_proj"] + scores["o_proj"]).view(-1, n_rep).sum(1)
    return _whole(query + scores["k_proj"] + scores["v_proj"], kept, n_rep)


METHODS: dict[str, Callable[[dict[str, torch.Tensor], int, int], Heads]] = {
    "truncate": truncate, "reselect": reselect, "group_mean": group_mean, "group": group,
}  # fmt: skip


def _best(scores: torch.Tensor, count: int) -> list[int]:
    return sorted(scores.argsort(descending=True, stable=True)[:count].tolist())


def _whole(scores: torch.Tensor, kept: int, n_rep: int) -> Heads:
    groups = _best(scores, kept)
    return groups, [group * n_rep + head for group in groups for head in range(n_rep)]


@torch.no_grad()
def build(model: torch.nn.Module, plan: PruningPlan, heads: list[Heads]) -> torch.nn.Module:
    """A model of the plan's sizes whose attention weights are those of `heads`, in the order given."""
    layers = []
    for shape, kept, (groups, _) in zip(plan.source.layers, plan.layers, heads, strict=True):
        layers.append(LayerPlan.of_groups(shape, groups, kept.ffn_channels))
    pruned = gp.prune(model, replace(plan, layers=tuple(layers)), compensation="none")
    for dense, layer, (groups, queries) in zip(model.model.layers, pruned.model.layers, heads, strict=True):
        d = dense.self_attn.head_dim
        for name in ATTENTION:
            chosen = torch.tensor(groups if name in ("k_proj", "v_proj") else queries)
            index = (chosen[:, None] * d + torch.arange(d)).flatten()
            weight = dense.self_attn.get_submodule(name).weight
            layer.self_attn.get_submodule(name).weight.copy_(weight[:, index] if name == "o_proj" else weight[index])
    return pruned


def measure(folder: Path, texts: list[Text], seq_len: int) -> dict[str, object]:
    """Perplexities and parameters of a checkpoint."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    results = {text.name: evaluate_perplexity(model, tokenizer, text, seq_len=seq_len).to_dict() for text in texts}
    return {"parameters": model.num_parameters(), "perplexity": results}


def table(rows: dict[str, dict]) -> str:
    """Markdown: perplexity and ratio to dense."""
    dense = rows["dense"]["perplexity"]
    lines = ["| method | parameters | " + " | ".join(dense) + " |", "|---|---:|" + "---:|" * len(dense)]
    for name, row in rows.items():
        cells = [
            f"{value['value']:.2f} ({value['value'] / dense[text]['value']:.3f}x)"
            for text, value in row["perplexity"].items()
        ]
        lines.append(f"| {name} | {row['parameters']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: dict[str, dict], path: Path) -> None:
    """Ratios to dense, before and after LoRA."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    dense = rows["dense"]["perplexity"]
    names = [name for name in METHODS if name in rows]
    for shift, (suffix, shade) in enumerate((("", 1.0), (" + LoRA", 0.45))):
        for index, text in enumerate(dense):
            values = [
                rows[name + suffix]["perplexity"][text]["value"] / dense[text]["value"]
                for name in names
                if name + suffix in rows
            ]
            places = [x + (index + shift * len(dense)) * 0.8 / (2 * len(dense)) for x in range(len(values))]
            axes.bar(places, values, 0.8 / (2 * len(dense)), color=f"C{index}", alpha=shade, label=text + suffix)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks([x + 0.35 for x in range(len(names))], names)
    axes.set(ylabel="perplexity / dense", title="the same sizes, four choices of heads")
    axes.legend(fontsize="small", ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", nargs="+", required=True, help="texts to calibrate and recover on")
    parser.add_argument("--test", nargs="+", required=True, help="texts to measure on")
    parser.add_argument("--backbone-ratio", type=float, default=0.35)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--max-chars", type=int)
    parser.add_argument("--recovery-tokens", type=int, default=200_000, help="0 leaves LoRA out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    texts = [load_text(name, split="test", max_chars=args.max_chars) for name in args.test]
    calibration = gp.Calibration.from_text(
        tokenizer, args.calibration, samples=args.samples, seq_len=args.seq_len, seed=args.seed
    )
    scores = head_scores(model, calibration)
    statistics = gp.collect_statistics(model, calibration, criterion="taylor", moments=False)
    plan = gp.make_plan(statistics, backbone_ratio=args.backbone_ratio, allocation="uniform")
    print(plan)
    model.save_pretrained(args.output / "dense")
    tokenizer.save_pretrained(args.output / "dense")
    rows = {"dense": measure(args.output / "dense", texts, args.seq_len)}
    for name, choose in METHODS.items():
        heads = [
            choose(score, len(kept.kv_groups), shape.n_rep)
            for score, kept, shape in zip(scores, plan.layers, plan.source.layers, strict=True)
        ]
        folder = args.output / name
        build(model, plan, heads).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        rows[name] = measure(folder, texts, args.seq_len)
        if args.recovery_tokens:
            recovered = args.output / f"{name}-lora"
            gp.recover(
                folder, args.calibration, recovered, max_tokens=args.recovery_tokens, seq_len=args.seq_len,
                seed=args.seed, overwrite=True,
            )  # fmt: skip
            rows[f"{name} + LoRA"] = measure(recovered, texts, args.seq_len)
        print(table(rows), flush=True)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    for key in ("model", "output"):
        settings[key] = Path(settings[key]).name
    for key in ("calibration", "test"):
        settings[key] = [Path(name).name for name in settings[key]]
    write_json(args.output / "gqa_ablation.json", {"settings": settings, "rows": rows, "versions": versions()})
    (args.output / "gqa_ablation.md").write_text(table(rows) + "\n", encoding="utf-8")
    plot(rows, args.output / "gqa_ablation.png")
    print(json.dumps({name: row["parameters"] for name, row in rows.items()}))


if __name__ == "__main__":
    main()
