"""Compare torch-pruning's LLM recipe with this library on one model: seconds, peak memory and perplexity.

    python benchmarks/side_by_side.py MODEL --calibration TEXT... --test TEXT -o RESULTS.json

Each way runs in a process of its own, from loading the model to having written the pruned one. `torch-pruning` is used
as its documentation of language models says (`MetaPruner`, norms of weights, heads through `num_heads` and
`prune_num_heads`, local, `round_to=4`); what it leaves is measured in memory, since it cannot be loaded again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_gqaprune.configuration import CalibrationConfig, PruneRequest, PruningConfig
from hf_gqaprune.data.text import load_text
from hf_gqaprune.evaluation.perplexity import evaluate_perplexity
from hf_gqaprune.evaluation.report import versions
from hf_gqaprune.pipeline.prune import prune_model
from hf_gqaprune.plan import PruningPlan
from hf_gqaprune.utils.files import write_json

THEIRS = "torch-pruning's recipe"


def torch_pruning_recipe(args: argparse.Namespace, output: Path) -> Any:
    """Heads and all other widths, the hidden size among them, cut by `--width-ratio` in every layer alike."""
    import torch_pruning as tp

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    # tracing stumbles over a cache among the outputs
    model.config.use_cache = False
    config, heads = model.config, {}
    for layer in model.model.layers:
        attention = layer.self_attn
        heads[attention.q_proj] = config.num_attention_heads
        heads[attention.k_proj] = heads[attention.v_proj] = config.num_key_value_heads
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=torch.tensor([[config.bos_token_id, 5, 6, 7]]),
        importance=tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
        global_pruning=False,
        pruning_ratio=args.width_ratio,
        head_pruning_ratio=args.width_ratio,
        ignored_layers=[model.lm_head],
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        # left out, these are dictionaries that all pruners share
        in_channel_groups={},
        out_channel_groups={},
        round_to=4,
    )
    for group in pruner.step(interactive=True):
        group.prune()
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.num_key_value_groups = attention.q_proj.out_features // attention.k_proj.out_features
    model.save_pretrained(output)
    return model


def ours(**options: Any) -> Callable[[argparse.Namespace, Path], Any]:
    """`gqaprune prune` with these options."""

    def run(args: argparse.Namespace, output: Path) -> Any:
        request = PruneRequest(
            args.model, PruningConfig(ratio=args.ratio, **options),
            CalibrationConfig(args.calibration, args.samples, args.seq_len),
        )  # fmt: skip
        prune_model(request, output)
        return None

    return run


WAYS = {
    THEIRS: torch_pruning_recipe,
    "magnitude, no re-fit": ours(criterion="magnitude", compensation="none"),
    "least squares": ours(compensation="least_squares"),
    "default": ours(),
}


def child(way: str, args: argparse.Namespace) -> None:
    """Prune in this process and print what it took and what it left, as JSON."""
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "pruned"
        start = time.perf_counter()
        model = WAYS[way](args, output)
        seconds = time.perf_counter() - start
        lines = (line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        peak = next(int(value.split()[0]) for key, value in lines if key == "VmHWM") * 1024
        loads = True
        if model is None:
            model = AutoModelForCausalLM.from_pretrained(output).eval()
        else:
            try:
                AutoModelForCausalLM.from_pretrained(output)
            except (RuntimeError, ValueError) as error:
                print(type(error).__name__, str(error).splitlines()[0], file=sys.stderr)
                loads = False
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        text = load_text(args.test, split="test", max_chars=args.max_chars)
        parameters = sum(p.numel() for p in model.parameters())
        try:
            perplexity = evaluate_perplexity(model, tokenizer, text, seq_len=args.seq_len).value
        except RuntimeError as error:
            print(str(error).splitlines()[0], file=sys.stderr)
            perplexity = None
    found = {"seconds": seconds, "peak_rss": peak, "parameters": parameters, "loads": loads, "perplexity": perplexity}
    print(json.dumps(found))


def main() -> None:
    """Run every way, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--width-ratio", type=float, default=0.2, help="of every width, theirs; ours removes as much")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--max-chars", type=int, default=110_000)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--ratio", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        child(args.way, args)
        return
    results: dict[str, Any] = {}
    dense = PruningPlan.keep_all(AutoConfig.from_pretrained(args.model)).before.parameters
    print("| | parameters | perplexity | loads again | seconds | peak memory, MiB |\n|---|---:|---:|---|---:|---:|")
    for way in WAYS:
        ratio = 1 - results[THEIRS]["parameters"] / dense if results else 0
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way, "--ratio", str(ratio)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
        results[way] = found
        perplexity = "does not run" if found["perplexity"] is None else f"{found['perplexity']:,.2f}"
        cells = (
            way, f"{found['parameters']:,}", perplexity, "yes" if found["loads"] else "no",
            f"{found['seconds']:.1f}", f"{found['peak_rss'] / 2**20:.0f}",
        )  # fmt: skip
        print("| " + " | ".join(cells) + " |", flush=True)
    settings = {name: getattr(args, name) for name in ("width_ratio", "samples", "seq_len", "max_chars")}
    write_json(args.output, {"ways": results, "settings": settings, "versions": versions()})


if __name__ == "__main__":
    main()
