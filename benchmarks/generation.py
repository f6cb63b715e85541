"""Measure the generation speed of dense and pruned models of real shapes against the prediction from FLOPs and bytes.

    python benchmarks/generation.py llama-3-8b --ratios 0.2 0.3 0.5 -o generation.json [--device cuda] [--round-to 1 64]

Weights and plans are random; attention and FFNs lose the same share of the backbone, each layer its own. Weights are made
on the device, in bfloat16, and one model is there at a time. Medians of `--repeat` runs, after one that is not counted:

prefill: one forward pass that fills a cache and gives the logits of the last position.
generate at a batch: new tokens of a greedy `model.generate`.
step at a batch: a greedy decoding step on a static cache of prompt and new tokens, captured in a CUDA graph; CUDA only.

Predicted, the dense model's cost over the pruned one's: FLOPs per token of the linear layers (in prefill the head sees one
position of each sequence), and bytes that a step reads at a batch: weights without the embedding table, and the cache.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from shapes import SHAPES, random_windows
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

import hf_gqaprune as gp
from hf_gqaprune.evaluation.report import versions
from hf_gqaprune.models.decoder import empty_model
from hf_gqaprune.models.shapes import ModelShape
from hf_gqaprune.surgery import pruned_config
from hf_gqaprune.utils.files import write_json

_SIZES = ("prefill", "prompt", "new_tokens", "batches", "repeat")


def random_plan(config: LlamaConfig, ratio: float, round_to: int = 1) -> gp.PruningPlan:
    """Remove this ratio of the backbone by chance, attention's share told, as chance would take nearly all KV groups."""
    shape = ModelShape.from_config(config)
    share = sum(map(shape.attention_parameters, shape.layers)) / shape.cost.backbone_parameters
    options = {"backbone_ratio": ratio, "attention_share": share, "round_to": round_to}
    return gp.make_plan(model=empty_model(config), criterion="random", **options)


def random_model(config: Any, device: str) -> Any:
    """A model with random bfloat16 weights, made on the device."""
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def cost(shape: ModelShape, sizes: argparse.Namespace) -> dict[str, float]:
    """FLOPs per token in prefill and in decoding; bytes that a decoding step reads at each batch."""
    whole, head = shape.cost, shape.vocab_size * shape.hidden_size
    weights = 2 * (whole.parameters - (0 if shape.tie_word_embeddings else head))
    cache = (sizes.prompt + sizes.new_tokens) * whole.kv_bytes_per_token
    flops = {"prefill FLOPs": whole.flops_per_token - 2 * head * (1 - 1 / sizes.prefill[1]), "FLOPs": whole.flops_per_token}
    return flops | {f"bytes at {batch}": weights + batch * cache for batch in sizes.batches}


def seconds(work: Callable[[], object], repeat: int, device: str) -> float:
    """The median of several runs after one to warm up."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for _ in range(1 + repeat):
        wait()
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def decoding_step(model: Any, ids: torch.Tensor, positions: int) -> tuple[Callable[[], torch.Tensor], StaticCache]:
    """A greedy step that puts the next tokens in place of the last ones, and its static cache, filled with `ids`."""
    cache = StaticCache(config=model.config, max_cache_len=positions)

    def following(tokens: torch.Tensor) -> torch.Tensor:
        # the fourth argument is the cache, whose name depends on the version of transformers
        return model(tokens, None, None, cache, logits_to_keep=1).logits.argmax(-1)

    tokens = following(ids)
    return lambda: tokens.copy_(following(tokens)), cache


def take(steps: int, step: Callable[[], object], cache: StaticCache) -> None:
    """So many steps; then the cache forgets them."""
    for _ in range(steps):
        step()
    cache.crop(-steps)


def capture(step: Callable[[], object], cache: StaticCache) -> torch.cuda.CUDAGraph:
    """The graph of a step; the cache is as long afterwards as before."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            take(1, step, cache)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        step()
    return graph


def measure(config: Any, device: str, sizes: argparse.Namespace, graph: bool) -> dict[str, float]:
    """Tokens per second of prefill and of `generate`; with `graph`, milliseconds of a captured step."""
    gc.collect()  # of the model before
    torch.cuda.empty_cache()
    model, vocabulary, new = random_model(config, device), config.vocab_size, sizes.new_tokens
    batch, length = sizes.prefill
    greedy = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new, "pad_token_id": config.eos_token_id}
    found = {}
    with torch.inference_mode():
        ids = random_windows(vocabulary, batch * length, length).to(device)
        found["prefill, tokens/s"] = ids.numel() / seconds(partial(model, ids, logits_to_keep=1), sizes.repeat, device)
        prompts = [random_windows(vocabulary, b * sizes.prompt, sizes.prompt).to(device) for b in sizes.batches]
        for ids in prompts:
            generate = partial(model.generate, ids, attention_mask=torch.ones_like(ids), **greedy)
            found[f"generate at {len(ids)}, tokens/s"] = len(ids) * new / seconds(generate, sizes.repeat, device)
        for ids in prompts if graph else ():
            step, cache = decoding_step(model, ids, sizes.prompt + new)
            steps = partial(take, new, capture(step, cache).replay, cache)
            found[f"step at {len(ids)}, ms"] = 1000 * seconds(steps, sizes.repeat, device) / new
    return found


def line(row: dict[str, Any]) -> str:
    """The row of the table."""
    cells = [f"{row['ratio']:.0%}", str(row["round_to"]), f"{row['parameters']:,}"]
    for name, value in row["measured"].items():
        cells.append(f"{format(value, '.2f' if name.endswith('ms') else ',.0f')} ({row['speed'][name]:.2f}x)")
    return "| " + " | ".join(cells + [f"{value:.2f}x" for value in row["predicted"].values()]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.2, 0.3, 0.5], help="of the backbone")
    parser.add_argument("--round-to", nargs="+", type=int, default=[1], help="FFN widths are multiples of it; each is tried")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-graph", action="store_true", help="leave the captured step out")
    parser.add_argument("--prefill", nargs=2, type=int, default=[4, 2048], metavar=("BATCH", "TOKENS"))
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64], help="of generate and of the step")
    parser.add_argument("--repeat", type=int, default=5, help="runs whose median is taken")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file of the results")
    args = parser.parse_args()
    dense, graph = LlamaConfig(**SHAPES[args.shape]), args.device == "cuda" and not args.no_graph
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    results = {"shape": args.shape, "device": name, **{key: getattr(args, key) for key in _SIZES}, "versions": versions()}
    rows: list[dict[str, Any]] = []
    for ratio, multiple in [(0.0, 1), *product(args.ratios, args.round_to)]:
        plan = random_plan(dense, ratio, multiple) if ratio else gp.PruningPlan.keep_all(dense)
        found = measure(pruned_config(dense, plan) if ratio else dense, args.device, args, graph)
        first, whole, left = rows[0]["measured"] if rows else found, cost(plan.source, args), cost(plan.target, args)
        rates = {key: value / first[key] for key, value in found.items()}
        row: dict[str, Any] = {"ratio": ratio, "round_to": multiple, "parameters": plan.after.parameters, "measured": found}
        row["speed"] = {key: 1 / rate if key.endswith("ms") else rate for key, rate in rates.items()}
        rows.append(row | {"predicted": {key: value / left[key] for key, value in whole.items()}})
        write_json(args.output, results | {"models": rows})
        if len(rows) == 1:
            titles = ["backbone removed", "FFN multiple of", "parameters", *found, *(f"predicted by {key}" for key in whole)]
            print("| " + " | ".join(titles) + " |\n|" + "---:|" * len(titles))
        print(line(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
