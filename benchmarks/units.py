"""Prune other units than KV groups and FFN channels in the same setting: one table of pruned / dense perplexity.

    python benchmarks/units.py MODEL --calibration TEXT... --test TEXT... -o RESULTS.json

Every plan has the same parameters, is priced by the curvature, and is re-fitted in closed form or as `--compensation`
says; what was merged always in closed form, and what is `sliced` or has `biases` not at all.
"""

from __future__ import annotations

import argparse
import json
import statistics as summary
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from competitors import Dense
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_gqaprune as gp
from hf_gqaprune.compensation.least_squares import ResidualStreams
from hf_gqaprune.data.text import load_text
from hf_gqaprune.data.windows import refit_batches, split_batches
from hf_gqaprune.evaluation.perplexity import evaluate_perplexity
from hf_gqaprune.evaluation.report import versions
from hf_gqaprune.models.build import assemble, config_of_layers
from hf_gqaprune.models.decoder import DecoderInputs
from hf_gqaprune.plan import PruningPlan
from hf_gqaprune.utils.files import write_json

ATTENTION, MLP = "attention", "mlp"


@dataclass
class Trial(Dense):
    """A model, its calibration windows, and how what is left is re-fitted."""

    compensation: str = "least_squares"


def groups(dense: Trial, ratio: float) -> Any:
    """The default's plan."""
    return _refitted(dense, gp.make_plan(dense.statistics("curvature"), backbone_ratio=ratio))


def whole_blocks(dense: Trial, ratio: float) -> Any:
    """The same, and whole blocks may go."""
    plan = gp.make_plan(dense.statistics("curvature"), backbone_ratio=ratio, min_kv_heads=0, min_ffn=0)
    return _refitted(dense, plan)


def query_heads(dense: Trial, ratio: float) -> Any:
    """One query head after the other from every group of a layer; every KV head stays."""
    return _thinned(dense, ratio, min_kv_heads=dense.model.config.num_key_value_heads)


def groups_and_query_heads(dense: Trial, ratio: float) -> Any:
    """Per layer whatever number of query heads from every group, and of whole groups, costs least."""
    return _thinned(dense, ratio)


def _thinned(dense: Trial, ratio: float, **floor: int) -> Any:
    statistics = dense.statistics("curvature")
    plan = gp.make_plan(statistics, model=dense.model, backbone_ratio=ratio, allocation="query_heads", **floor)
    return _refitted(dense, plan)


def _refitted(dense: Trial, plan: PruningPlan) -> Any:
    print(plan, flush=True)
    return gp.prune(dense.model, plan, dense.statistics("curvature"), compensation=dense.compensation)


def bias(dense: Trial, ratio: float) -> Any:
    """The default's units, and the mean of what went as biases instead of a re-fit; these count."""
    return _biased(dense, ratio, "curvature")


def sliced(dense: Trial, ratio: float) -> Any:
    """The default's units, and nothing in their place."""
    return gp.prune(dense.model, gp.make_plan(dense.statistics("curvature"), backbone_ratio=ratio), compensation="none")


def flap(dense: Trial, ratio: float) -> Any:
    """FLAP's units and biases, which count."""
    return _biased(dense, ratio, "flap")


def flap_sliced(dense: Trial, ratio: float) -> Any:
    """FLAP's units, and nothing in their place."""
    return gp.prune(dense.model, gp.make_plan(dense.statistics("flap"), backbone_ratio=ratio), compensation="none")


def _biased(dense: Trial, ratio: float, criterion: str) -> Any:
    statistics = dense.statistics(criterion)
    plan = gp.make_plan(statistics, backbone_ratio=ratio, compensation="bias")
    return gp.prune(dense.model, plan, statistics, compensation="bias")


def merged_mean(dense: Trial, ratio: float) -> Any:
    """KV groups merged in pairs first, K and V their means (Ainslie et al. 2023, arXiv:2305.13245), all query heads kept."""
    return _merged(dense, ratio, least_squares=False)


def merged_least_squares(dense: Trial, ratio: float) -> Any:
    """KV groups merged in pairs first, K and V the subspaces that keep most of both, the rotations put into Q and O."""
    return _merged(dense, ratio, least_squares=True)


def _merged(dense: Trial, ratio: float, least_squares: bool) -> Any:
    """Merge in every layer, prune the merged model to the parameters that `ratio` leaves, re-fit it to the dense one."""
    whole = PruningPlan.keep_all(dense.model.config).source
    left = whole.cost.parameters - ratio * whole.cost.backbone_parameters
    merged = _merge_model(dense, least_squares)
    have = sum(parameter.numel() for parameter in merged.parameters())
    if have - left > 3 * whole.hidden_size:
        measured = gp.collect_statistics(merged, dense.calibration)
        plan = gp.make_plan(measured, ratio=1 - left / have)
        print(plan, flush=True)
        merged = gp.prune(merged, plan, compensation="none")
    calibration, config = dense.calibration, dense.model.config
    ids, held_out = refit_batches(calibration.fitted, calibration.held_out, config.vocab_size)
    with torch.no_grad():
        hidden = [dense.model.get_input_embeddings()(batch) for batch in ids]
    decoder_inputs = DecoderInputs(config, dense.model.model.rotary_emb, calibration.ids.shape[1], torch.float32)
    # sizes alone do not tell that the first layer differs
    streams = ResidualStreams(hidden, hidden, held_out, decoder_inputs, merged.config, differs=True)
    for index, (layer, new) in enumerate(zip(dense.model.model.layers, merged.model.layers, strict=True)):
        for kind in (ATTENTION, MLP):
            streams.refit_block(index, kind, layer, new)
    return merged


@torch.no_grad()
def _merge_model(dense: Trial, least_squares: bool) -> Any:
    source = PruningPlan.keep_all(dense.model.config).source
    state = {name: tensor.clone() for name, tensor in dense.model.state_dict().items()}
    inputs = _attention_inputs(dense)
    for index, shape in enumerate(source.layers):
        names = {n: f"model.layers.{index}.self_attn.{n}_proj.weight" for n in "qkvo"}
        moments = dense.statistics("curvature").blocks[index, ATTENTION].moments
        new = _merge({n: state[name].double() for n, name in names.items()}, inputs[index], moments.gradients.double(),
                     shape.kv_heads, shape.n_rep, least_squares)  # fmt: skip
        state |= {names[n]: weight.float().contiguous() for n, weight in new.items()}
    shapes = [replace(shape, kv_heads=shape.kv_heads // 2) for shape in source.layers]
    return assemble(dense.model, config_of_layers(dense.model.config, shapes), state)


def _attention_inputs(dense: Trial) -> list[torch.Tensor]:
    """Second moment of what every q_proj is given, float64 `(hidden, hidden)`, up to a factor."""
    layers = dense.model.model.layers
    sums = [torch.zeros(dense.model.config.hidden_size, dense.model.config.hidden_size) for _ in layers]
    hooks = []
    for layer, total in zip(layers, sums, strict=True):

        def add(_module: Any, args: tuple[torch.Tensor, ...], total: torch.Tensor = total) -> None:
            total.addmm_(args[0].flatten(0, -2).T, args[0].flatten(0, -2))

        hooks.append(layer.self_attn.q_proj.register_forward_pre_hook(add))
    for batch in split_batches(dense.calibration.ids, dense.model.config.vocab_size):
        dense.model(batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [total.double() / dense.calibration.tokens for total in sums]


def _merge(
    w: dict[str, torch.Tensor], c: torch.Tensor, g: torch.Tensor, kv_heads: int, n_rep: int, least_squares: bool
) -> dict[str, torch.Tensor]:
    """Merge the pairs of groups that lose least, greedily.

    Values: with M_i the sum of W_o^T G W_o over the query heads of group i, the 2d numbers (M_i^1/2 v_i, M_j^1/2 v_j) are
    replaced by their d principal components, and what leads back goes into W_o. Keys: the same per rotary frequency, whose
    two numbers are one complex one that rotations commute with, weighted by the energy of the queries.

    Args:
        w: `q (n_q d, hidden)`, `k` and `v` `(n_kv d, hidden)`, `o (hidden, n_q d)`, float64.
        c: second moment of the inputs, `(hidden, hidden)`.
        g: second moment of the loss gradient at the outputs, `(hidden, hidden)`.
    """
    d = len(w["k"]) // kv_heads
    q = w["q"].view(kv_heads, n_rep, d, -1)
    k, v = w["k"].view(kv_heads, d, -1), w["v"].view(kv_heads, d, -1)
    o = w["o"].T.reshape(kv_heads, n_rep, d, -1)
    complex_of = lambda x: torch.complex(x[..., : d // 2, :], x[..., d // 2 :, :])  # noqa: E731
    cc = c.to(torch.complex128)
    roots = []
    for group in range(kv_heads):
        values, vectors = torch.linalg.eigh(sum(x @ g @ x.T for x in o[group]))
        roots.append(vectors @ (values.clamp(min=1e-6 * float(values.max())).sqrt()[:, None] * vectors.T))
    energy = [sum(((x @ cc) * x.conj()).sum(-1).real for x in complex_of(q[group])).sqrt() for group in range(kv_heads)]

    def joined(i: int, j: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float]:
        stacked = torch.cat([roots[i] @ v[i], roots[j] @ v[j]])  # (2d, hidden)
        values, vectors = torch.linalg.eigh(stacked @ c @ stacked.T)
        pairs = torch.stack([energy[n][:, None] * complex_of(k[n]) for n in (i, j)], 1)  # (d / 2, 2, hidden)
        key_values, key_vectors = torch.linalg.eigh(pairs @ cc @ pairs.mH)
        lost = float(values[:d].sum() / values.sum() + key_values[:, 0].sum() / key_values.sum())
        return stacked, vectors[:, d:], pairs, key_vectors[..., 1], lost

    losses = sorted((joined(i, j)[-1], i, j) for i in range(kv_heads) for j in range(i))
    left, new = set(range(kv_heads)), {"q": [], "k": [], "v": [], "o": []}
    for _, i, j in losses:
        if not {i, j} <= left:
            continue
        left -= {i, j}
        if not least_squares:
            new["k"].append((k[i] + k[j]) / 2), new["v"].append((v[i] + v[j]) / 2)
            for n in (i, j):
                new["q"].extend(q[n]), new["o"].extend(o[n])
            continue
        stacked, back, pairs, u, _ = joined(i, j)
        new["v"].append(back.T @ stacked)
        key = (u.conj()[:, None, :] @ pairs)[:, 0]  # (d / 2, hidden)
        new["k"].append(torch.cat([key.real, key.imag]))
        for side, n in enumerate((i, j)):
            lead = torch.linalg.solve(roots[n], back[side * d : (side + 1) * d])  # v_n = lead z
            factor = (u[:, side].conj() / energy[n])[:, None]
            for query, out in zip(q[n], o[n], strict=True):
                turned = complex_of(query) * factor
                new["q"].append(torch.cat([turned.real, turned.imag])), new["o"].append(lead.T @ out)
    stacks = {name: torch.cat(parts) for name, parts in new.items()}
    return stacks | {"o": stacks["o"].T}


METHODS: dict[str, Callable[[Dense, float], Any]] = {
    "KV groups": groups,
    "KV groups, whole blocks may go": whole_blocks,
    "query heads, none of the groups": query_heads,
    "KV groups and query heads": groups_and_query_heads,
    "KV groups, biases in place of a re-fit": bias,
    "KV groups, sliced only": sliced,
    "FLAP with its biases": flap,
    "FLAP, sliced only": flap_sliced,
    "KV heads merged in pairs, mean": merged_mean,
    "KV heads merged in pairs, least squares": merged_least_squares,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--test", nargs="+", required=True)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.35, 0.5])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--compensation", choices=("natural_gradient", "least_squares"), default="least_squares")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--samples", type=int, default=384)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--max-chars", type=int, default=40_000)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    texts = [load_text(name, split="test", max_chars=args.max_chars) for name in args.test]

    def perplexities(of: Any) -> dict[str, float]:
        scored = (evaluate_perplexity(of, tokenizer, text, seq_len=args.seq_len, drop_tail=True) for text in texts)
        return {result.dataset: result.value for result in scored}

    whole = perplexities(model)
    settings = {name: getattr(args, name) for name in ("samples", "seq_len", "max_chars", "compensation")}
    settings["calibration"] = [Path(name).name for name in args.calibration]
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        calibration = gp.Calibration.from_text(
            tokenizer, args.calibration, samples=args.samples, seq_len=args.seq_len, seed=seed
        )
        source = Trial(model, calibration, compensation=args.compensation)
        for method in args.methods:
            for ratio in args.ratios:
                start = time.perf_counter()
                pruned = METHODS[method](source, ratio)
                seconds = time.perf_counter() - start
                ratios = {name: value / whole[name] for name, value in perplexities(pruned).items()}
                row = {"method": method, "ratio": ratio, "seed": seed, "parameters": pruned.num_parameters()}
                rows.append(row | {"ratios": ratios, "seconds": round(seconds, 1)})
                write_json(args.output, {"settings": settings, "dense": whole, "versions": versions(), "rows": rows})
                print(json.dumps(rows[-1]), flush=True)
    print("| method | backbone removed | seed | parameters | " + " | ".join(whole) + " | geometric mean |")
    print("|---|---:|---:|---:|" + "---:|" * (len(whole) + 1))
    for row in rows:
        values = [*row["ratios"].values(), summary.geometric_mean(row["ratios"].values())]
        cells = " | ".join(f"{value:.4f}" for value in values)
        print(f"| {row['method']} | {row['ratio']:.1%} | {row['seed']} | {row['parameters']:,} | {cells} |")


if __name__ == "__main__":
    main()
