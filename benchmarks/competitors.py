"""Implement published structured-pruning methods on this library's parts: each function prunes a share of the backbone.

What a method decides (score, share per layer, what becomes of the rest) is the paper's; what it removes is whole KV groups
and FFN channels throughout, because nothing else is a Llama afterwards. Only `truncate` breaks that, as its author did.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from gqa_ablation import build, head_scores
from gqa_ablation import truncate as truncate_heads
from torch import nn

import hf_gqaprune as gp
from hf_gqaprune.dependency_graph import trace_units
from hf_gqaprune.errors import UsageError
from hf_gqaprune.linalg.obs import remove_greedily
from hf_gqaprune.models.blocks import OUTPUT_PROJECTION
from hf_gqaprune.plan import LayerPlan, PruningPlan
from hf_gqaprune.selection.layer_importance import similarity
from hf_gqaprune.statistics.moments import Curve


@dataclass
class Dense:
    """A model, its calibration windows, and what was measured of it so far: `{criterion: Statistics}`."""

    model: Any
    calibration: gp.Calibration
    measured: dict[str, gp.Statistics] = field(default_factory=dict)

    def statistics(self, criterion: str) -> gp.Statistics:
        """One calibration pass per criterion, whatever the number of ratios."""
        if criterion not in self.measured:
            self.measured[criterion] = gp.collect_statistics(self.model, self.calibration, criterion=criterion)
        return self.measured[criterion]


def default(dense: Dense, ratio: float) -> nn.Module:
    """What `gqaprune prune --backbone-ratio` does."""
    statistics = dense.statistics("curvature")
    return gp.prune(dense.model, gp.make_plan(statistics, backbone_ratio=ratio), statistics)


def sliced(dense: Dense, ratio: float) -> nn.Module:
    """The default's plan without any re-fit."""
    return _sliced(dense, "curvature", backbone_ratio=ratio)


def llm_pruner(dense: Dense, ratio: float) -> nn.Module:
    """LLM-Pruner (Ma et al. 2023, arXiv:2305.11627): first-order Taylor, uniform, the ends of the model left whole.

    The paper prunes layers 4 to 29 of 32. Where the layers in between do not hold the budget, all are pruned.
    """
    layers = dense.model.config.num_hidden_layers
    ends = [*range(max(1, layers * 3 // 32)), *(-1 - i for i in range(max(1, layers * 2 // 32)))]
    try:
        return _sliced(dense, "taylor", backbone_ratio=ratio, allocation="uniform", keep_layers=ends)
    except UsageError:
        return taylor_uniform(dense, ratio)


def taylor_uniform(dense: Dense, ratio: float) -> nn.Module:
    """LLM-Pruner's score, all layers alike."""
    return _sliced(dense, "taylor", backbone_ratio=ratio, allocation="uniform")


def taylor_global(dense: Dense, ratio: float) -> nn.Module:
    """LLM-Pruner's score per parameter, ranked over the whole model."""
    return _sliced(dense, "taylor", backbone_ratio=ratio)


def wanda_sp(dense: Dense, ratio: float) -> nn.Module:
    """Wanda-sp, the structured Wanda of FLAP's paper (arXiv:2312.11983): |W| times the norm of the inputs, uniform."""
    return _sliced(dense, "wanda", backbone_ratio=ratio, allocation="uniform")


def magnitude(dense: Dense, ratio: float) -> nn.Module:
    """L2 norm of the weights, uniform (Li et al. 2017, arXiv:1608.08710)."""
    return _sliced(dense, "magnitude", backbone_ratio=ratio, allocation="uniform")


def flap(dense: Dense, ratio: float) -> nn.Module:
    """FLAP (An et al. 2024, arXiv:2312.11983): standardised fluctuation, global, the mean of what went as a bias (eq. 7).

    The biases of `o_proj` and `down_proj` come on top of the parameters of the plan.
    """
    statistics = dense.statistics("flap")
    plan = gp.make_plan(statistics, backbone_ratio=ratio)
    pruned = gp.prune(dense.model, plan, compensation="none")
    for index, (kept, slices) in enumerate(zip(plan.layers, trace_units(plan.source.layers), strict=True)):
        columns = slices.kept(kept.kv_groups, kept.query_heads, kept.ffn_channels)
        for kind, name in OUTPUT_PROJECTION.items():
            if (index, kind) not in statistics.blocks:
                continue
            weight = dense.model.model.layers[index].get_submodule(name).weight.detach()
            mean = statistics.blocks[index, kind].moments.input_mean.to(weight).clone()
            mean[columns[name][1]] = 0
            linear = pruned.model.layers[index].get_submodule(name)
            old = 0 if linear.bias is None else linear.bias.detach()
            linear.bias = nn.Parameter(weight @ mean + old)
    return pruned


def osscar(dense: Dense, ratio: float) -> nn.Module:
    """OSSCAR's problem (Meng et al. 2024, arXiv:2403.12983): least squares per block, greedy removal, re-fit, uniform.

    Every block is measured on the dense model's inputs; removal is greedy without the paper's local search.
    """
    name = "OSSCAR"
    if name not in dense.measured:
        plain = dense.statistics("wanda")
        blocks = {}
        for (layer, kind), block in plain.blocks.items():
            slices = trace_units(plain.source.layers)[layer]
            linear = dense.model.model.layers[layer].get_submodule(OUTPUT_PROJECTION[kind])
            weight = linear.weight.detach().double().cpu()  # where the moments are kept
            columns = slices.units(kind)[OUTPUT_PROJECTION[kind]][1]
            curve = Curve(*remove_greedily(block.moments.ridged(), weight.T @ weight, columns))
            blocks[layer, kind] = replace(block, curve=curve)
        # without windows, `prune` refits each block by itself
        dense.measured[name] = gp.Statistics(plain.source, name, blocks)
    statistics = dense.measured[name]
    plan = gp.make_plan(statistics, backbone_ratio=ratio, allocation="uniform")
    return gp.prune(dense.model, plan, statistics, compensation="least_squares")


def short_gpt(dense: Dense, ratio: float) -> nn.Module:
    """ShortGPT (Men et al. 2024, arXiv:2403.03853): whole layers go, those whose output is most like their input.

    The number of layers is the nearest to the ratio, at least one.
    """
    scores = torch.tensor(similarity(dense.model, dense.calibration))
    source = PruningPlan.keep_all(dense.model.config).source
    dropped = set(scores.argsort()[: max(1, round(ratio * len(scores)))].tolist())
    kept = [
        LayerPlan.of_groups(shape, *(((), ()) if index in dropped else (range(shape.kv_heads), range(shape.ffn))))
        for index, shape in enumerate(source.layers)
    ]
    return gp.prune(dense.model, PruningPlan(source, tuple(kept)), compensation="none")


def truncate(dense: Dense, ratio: float) -> nn.Module:
    """KV heads by their own score, then the last query heads cut until the ratio fits (see `gqa_ablation`)."""
    plan = gp.make_plan(dense.statistics("taylor"), backbone_ratio=ratio, allocation="uniform")
    with torch.enable_grad():
        scores = head_scores(dense.model, dense.calibration)
    heads = [
        truncate_heads(score, len(kept.kv_groups), shape.n_rep)
        for score, kept, shape in zip(scores, plan.layers, plan.source.layers, strict=True)
    ]
    return build(dense.model, plan, heads)


def _sliced(dense: Dense, criterion: str, **demand: Any) -> nn.Module:
    plan = gp.make_plan(dense.statistics(criterion), **demand)
    return gp.prune(dense.model, plan, compensation="none")


METHODS: dict[str, Callable[[Dense, float], nn.Module]] = {
    "default": default,
    "curvature, sliced only": sliced,
    "OSSCAR, uniform": osscar,
    "FLAP": flap,
    "LLM-Pruner": llm_pruner,
    "Taylor, uniform": taylor_uniform,
    "Taylor, global": taylor_global,
    "Wanda-sp": wanda_sp,
    "magnitude, uniform": magnitude,
    "ShortGPT": short_gpt,
    "truncate": truncate,
}
#: what does not look at calibration text
SEEDLESS = ("magnitude, uniform",)
