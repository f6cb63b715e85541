"""Prune a model as a plan says, and refit its output projections in closed form."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from .compensation import natural_gradient_steps, refit_columns, refit_on_pruned_prefix, ridge_record
from .data import HELD_OUT_EVERY
from .dependency_graph import UnitSlices, trace_units
from .errors import UsageError, WorkError, unknown
from .models import (
    BLOCK_MODULES,
    OUTPUT_PROJECTION,
    PrunedLlamaConfig,
    PrunedLlamaForCausalLM,
    assemble,
    check_loaded,
    check_materialized,
    check_outer_weights,
    check_weights,
    config_of_layers,
    eval_without_grad,
)
from .plan import LayerPlan, PruningPlan
from .statistics import Moments, Statistics
from .utils import CPU, track

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
#: from the best to the cheapest
COMPENSATIONS = ("natural_gradient", "least_squares", "bias", "none")


def prune(
    model: PreTrainedModel,
    plan: PruningPlan,
    statistics: Statistics | None = None,
    *,
    compensation: str = COMPENSATIONS[0],
    inplace: bool = False,
) -> PrunedLlamaForCausalLM:
    """Apply `plan` to `model`.

    Args:
        model: the Llama or pruned Llama causal LM that the plan was made for; any float dtype, which is kept.
        plan: which units stay.
        statistics: second moments and calibration windows; needed unless `compensation` is `none`. Without windows
            `least_squares` makes only the first refit, on the moments alone, with a warning.
        compensation: `least_squares` refits `o_proj` and `down_proj` of every changed block on the dense moments, then
            every linear from there on, layer by layer, on the inputs that the pruned prefix gives it (see
            `compensation.least_squares`); `natural_gradient` then moves every linear of the layers towards the dense
            model's predictions (see `compensation.natural_gradient`); `bias` adds the mean of what was removed to the biases
            of `o_proj` and `down_proj` (see `prune_layer`), for a plan whose model has biases; `none` only slices.
        inplace: take what stays whole from `model` instead of copying it, and free the rest; `model` is unusable
            afterwards. Otherwise `model` stays untouched and shares no memory with the result.

    Returns:
        The pruned model in eval mode, on the device of `model`, or over those that a `device_map` put it on, with
        `prune_plan` set (composed with the plan that `model` itself was pruned by, if any) and `compensation_record`: the
        ridges of the refit, and the passes of natural-gradient steps.

    Raises:
        UsageError: a plan for a model of other sizes; statistics that are missing, without moments or of another model.
        WorkError: a weight that is not finite, named; predictions of the pruned model that are not.
    """
    check_loaded(model)
    plan = plan.for_model(model.config)
    check_compensation(compensation, plan, statistics)
    check_materialized(model)
    inner: Any = model.get_decoder()
    check_weights(dict(enumerate(inner.layers)))
    check_outer_weights(model)
    slices = trace_units(plan.source.layers)
    state = _outer_state(model, inplace)
    # the dense layers are what is fitted to, and stay as they are meanwhile
    walked = statistics.calibration if statistics and compensation in ("natural_gradient", "least_squares") else None
    for index, kept in enumerate(track(plan.layers, "pruning", "layer")):
        layer = inner.layers[index]
        weights = dict(layer.state_dict())
        moments: dict[str, Moments] = {}
        if statistics and compensation != "none":
            statistics.check_weights(index, weights)
            moments = statistics.read(index, next((weight.device for weight in weights.values()), CPU))
        means = None
        if compensation == "bias":
            means, moments = {kind: m.input_mean for kind, m in moments.items()}, {}
        new = prune_layer(weights, kept, slices[index], moments, means=means, clone=walked is not None or not inplace)
        state |= {f"model.layers.{index}.{name}": tensor for name, tensor in new.items()}
    pruned = assemble(model, pruned_config(model.config, plan), state)
    previous = getattr(model, "prune_plan", None)
    whole = PruningPlan.from_dict(previous).compose(plan) if previous else plan
    pruned.prune_plan = whole.to_dict()
    pruned.compensation_record = {}
    if walked is not None:
        with eval_without_grad(model):
            pruned.compensation_record = {"ridges": ridge_record(refit_on_pruned_prefix(model, pruned, walked))}
            if compensation == "natural_gradient":
                passes = natural_gradient_steps(model, pruned, walked)
                pruned.compensation_record["passes"] = [asdict(each) for each in passes]
    if inplace:
        model.to("meta")
    return pruned


def prune_layer(
    state: Mapping[str, torch.Tensor],
    kept: LayerPlan,
    slices: UnitSlices,
    moments: Mapping[str, Moments],
    *,
    means: Mapping[str, torch.Tensor] | None = None,
    clone: bool = True,
) -> dict[str, torch.Tensor]:
    """Weights of one pruned layer.

    Means give every linear a bias, zero where it had none, and to that of an output projection they add
    W_:R mean(x_R), R the columns that go (FLAP, An et al. 2024, arXiv:2312.11983, eq. 7).

    Args:
        state: `{"self_attn.q_proj.weight": tensor, ...}` of the dense layer.
        kept: units that stay.
        slices: index sets of the layer.
        moments: `{kind: Moments}` of the blocks to refit.
        means: `{kind: (n,)}`, mean inputs of the output projections, to be made up for by biases.
        clone: copy also what stays whole, so that nothing is shared with `state`.

    Returns:
        The same names without those of absent blocks; dtype and device as given.
    """
    present = {"attention": bool(kept.kv_groups), "mlp": bool(kept.ffn_channels)}
    refit = {
        OUTPUT_PROJECTION[kind]: value
        for kind, value in moments.items()
        if present[kind] and _changed(kept, slices, kind)
    }
    result = {}
    cut = slices.kept(kept.kv_groups, kept.query_heads, kept.ffn_channels)
    for name, (dim, index) in cut.items():
        if not len(index):
            continue
        weight = state[f"{name}.weight"]
        if name in refit:
            try:
                weight = refit_columns(weight, refit[name], index)
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                raise WorkError(f"the moments of {name} are not positive definite: collect the statistics again") from error
        elif len(index) < weight.shape[dim]:
            weight = weight.index_select(dim, index.to(weight.device))
        elif clone:
            weight = weight.clone()
        result[f"{name}.weight"] = weight
        bias = state.get(f"{name}.bias")
        if bias is None and means is not None:
            bias = torch.zeros_like(state[f"{name}.weight"][:, 0])
        if bias is not None:
            bias = bias.index_select(0, index.to(bias.device)) if dim == 0 else bias.clone()
            result[f"{name}.bias"] = bias
    for kind, mean in (means or {}).items():
        name = OUTPUT_PROJECTION[kind]
        if present[kind]:
            gone = mean.double().cpu().index_fill(0, cut[name][1].cpu(), 0)
            bias = result[f"{name}.bias"]
            result[f"{name}.bias"] = bias + (state[f"{name}.weight"].double().cpu() @ gone).to(bias)
    for kind, (_, norm) in BLOCK_MODULES.items():
        if present[kind]:
            name = f"{norm}.weight"
            result[name] = state[name].clone() if clone else state[name]
    return result


def check_compensation(compensation: str, plan: PruningPlan, statistics: Statistics | None) -> None:
    """Raise [`UsageError`] unless `statistics` hold what `compensation` needs for `plan`."""
    if compensation not in COMPENSATIONS:
        raise unknown("compensation", compensation, COMPENSATIONS)
    source = plan.source
    if compensation == "bias" and not (plan.attention_bias and plan.mlp_bias):
        raise UsageError("compensation bias needs a plan that counts biases: make it with compensation='bias'")
    adds = (plan.attention_bias, plan.mlp_bias) != (source.attention_bias, source.mlp_bias)
    if adds and compensation != "bias":
        raise UsageError(f"the plan adds biases, which compensation bias fills, not {compensation}: pass bias")
    if compensation == "none":
        return
    if statistics is None:
        raise UsageError(f"compensation {compensation} needs statistics with moments: pass them, or compensation='none'")
    if statistics.source != plan.source:
        raise UsageError("the statistics were collected on a model of other sizes than the plan's")
    check_moments(compensation, statistics)
    check_windows(compensation, 0 if statistics.calibration is None else len(statistics.calibration.ids))


def check_moments(compensation: str, statistics: Statistics) -> None:
    """Raise [`UsageError`] unless every block has moments."""
    if not all(block.has_moments for block in statistics.blocks.values()):
        raise UsageError(f"compensation {compensation} needs moments, and these statistics were made without calibration")


def check_windows(compensation: str, windows: int) -> None:
    """Raise [`UsageError`] if `compensation` does nothing with so few calibration windows; warn if it does only a part."""
    if compensation == "natural_gradient" and windows < HELD_OUT_EVERY:
        raise UsageError(
            f"compensation natural_gradient chooses its steps on held-out windows, one in {HELD_OUT_EVERY}, and {windows} "
            f"calibration windows hold none out: give at least {HELD_OUT_EVERY} (--samples), or choose least_squares"
        )
    if compensation == "least_squares" and not windows:
        logger.warning("least_squares without calibration windows refits o_proj and down_proj of changed blocks alone")


def pruned_config(config: Any, plan: PruningPlan) -> PrunedLlamaConfig:
    """Return `config` with the layer sizes and biases of `plan`."""
    return config_of_layers(
        config, plan.target.layers, attention_bias=plan.attention_bias, mlp_bias=plan.mlp_bias
    )


def _changed(kept: LayerPlan, slices: UnitSlices, kind: str) -> bool:
    if kind == "mlp":
        return len(kept.ffn_channels) < len(slices.ffn[OUTPUT_PROJECTION["mlp"]])
    return len(kept.query_heads) < len(slices.group_of_query)


def _outer_state(model: PreTrainedModel, inplace: bool) -> dict[str, torch.Tensor]:
    """Embeddings, final norm and head; a tied head is left out."""
    tied = model.config.tie_word_embeddings
    names = ["model.embed_tokens.weight", "model.norm.weight", *([] if tied else ["lm_head.weight"])]
    return {n: model.get_parameter(n).detach() if inplace else model.get_parameter(n).detach().clone() for n in names}
