"""Layer scores against their definitions, and a model that is left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from support.tiny import tiny_llama, token_ids
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from hf_gqaprune import Calibration, collect_statistics, make_plan, prune
from hf_gqaprune.errors import UsageError, WorkError
from hf_gqaprune.selection.layer_importance import MEASURES
from hf_gqaprune.selection.layer_importance import measure_layers as measure


def calibration() -> Calibration:
    """Nine windows of 12 tokens, one of them held out."""
    return Calibration.from_ids(token_ids(9, 12))


def silence(model: LlamaForCausalLM, index: int) -> None:
    """Make a layer pass on what it is given."""
    layer = model.model.layers[index]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()


def test_similarity_is_one_minus_the_mean_cosine_over_fitted_tokens() -> None:
    model, windows = tiny_llama(layers=3), calibration()
    scores = measure(model, windows)
    # the last hidden state that the model returns has gone through the norm; the first two layers tell enough
    states = model(windows.fitted, output_hidden_states=True).hidden_states
    for index in range(2):
        a, b = states[index].double(), states[index + 1].double()
        cosines = (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)
        assert cosines.shape == (8, 12)
        assert scores[index] == pytest.approx(1 - float(cosines.mean().detach()), rel=1e-4)


def test_perplexity_is_the_rise_of_the_loss_without_the_layer() -> None:
    model, windows = tiny_llama(layers=3), calibration()
    ids = windows.fitted

    def loss(dense: LlamaForCausalLM) -> float:
        return float(F.cross_entropy(dense(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).detach())

    for index, score in enumerate(measure(model, windows, measure="perplexity")):
        without = copy.deepcopy(model)
        silence(without, index)
        assert score == pytest.approx(loss(without) - loss(model), abs=1e-5)


@pytest.mark.parametrize("name", list(MEASURES))
def test_a_layer_that_does_nothing_scores_zero(name: str) -> None:
    model = tiny_llama(layers=3)
    silence(model, 1)
    scores = measure(model, calibration(), measure=name)
    assert scores[1] == pytest.approx(0, abs=1e-6)
    assert min(abs(scores[0]), abs(scores[2])) > 1e-3


@pytest.mark.parametrize("name", list(MEASURES))
def test_the_model_is_left_as_it_was(name: str) -> None:
    model = tiny_llama().train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    first = measure(model, calibration(), measure=name)
    assert measure(model, calibration(), measure=name) == first
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", list(MEASURES))
def test_a_pruned_model_with_skipped_blocks_is_measured(name: str) -> None:
    model = tiny_llama(layers=3)
    statistics = collect_statistics(model, criterion="magnitude", moments=False)
    plan = make_plan(statistics, rates=[0, 0.95, 0], min_kv_heads=0, min_ffn=0)
    pruned = prune(model, plan, compensation="none")
    assert "attention" in plan.target.layers[1].skip
    scores = measure(pruned, calibration(), measure=name)
    assert len(scores) == 3
    again = make_plan(model=pruned, backbone_ratio=0.3, allocation="layer_importance", layer_scores=scores)
    assert again.backbone_ratio == pytest.approx(0.3, abs=0.02)


def test_less_important_layers_lose_more() -> None:
    model = tiny_llama(layers=3, ffn=64)
    silence(model, 1)
    scores = measure(model, calibration())
    plan = make_plan(model=model, backbone_ratio=0.3, allocation="layer_importance", layer_scores=scores)
    assert plan.target.layers[1].ffn < min(plan.target.layers[0].ffn, plan.target.layers[2].ffn)


def test_what_cannot_be_measured_is_told() -> None:
    model = tiny_llama()
    with pytest.raises(UsageError, match="unknown measure of layer importance 'similarty' \\(did you mean 'similarity'"):
        measure(model, calibration(), measure="similarty")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(float("inf"))
    for name in MEASURES:
        with pytest.raises(WorkError, match=f"importance by {name} is nan: the model's activations overflow"):
            measure(model, calibration(), measure=name)
