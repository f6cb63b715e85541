"""torch-pruning's own pruner on a Llama: whole KV groups, and the result is a checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
from support.tiny import tiny_llama, token_ids
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_gqaprune import PrunedLlamaForCausalLM
from hf_gqaprune.torch_pruning import kv_group_pruning, to_pruned_llama


def step(model: PreTrainedModel, **kwargs: Any) -> PrunedLlamaForCausalLM:
    importance = tp.importance.MagnitudeImportance(p=2, group_reduction="sum", normalizer=None)
    with kv_group_pruning(model) as gqa:
        pruner = tp.pruner.BasePruner(model, importance=gqa.importance(importance), **gqa.options, **kwargs)
        for group in gqa.whole(pruner.step(interactive=True)):
            group.prune()
    return to_pruned_llama(model)


def masked(model: PreTrainedModel, kept: list[tuple[list[int], list[int]]]) -> PreTrainedModel:
    """A copy of `model` in which only the KV groups and FFN channels `kept` of each layer reach the output."""
    model = copy.deepcopy(model)
    for layer, (groups, channels) in zip(model.model.layers, kept, strict=True):
        attention = layer.self_attn
        units = attention.k_proj.out_features // attention.head_dim
        for projection, keep, count in ((attention.o_proj, groups, units), (layer.mlp.down_proj, channels, None)):
            width = projection.in_features // (count or projection.in_features)
            gone = torch.ones(projection.in_features // width, dtype=torch.bool)
            gone[keep] = False
            with torch.no_grad():
                projection.weight[:, gone.repeat_interleave(width)] = 0
    return model


def scores(linears: list[tuple[nn.Linear, int]], units: int) -> list[float]:
    """Sum of squared weights (and output biases) per unit over `linears`, given as (linear, dim of its units)."""
    total = torch.zeros(units)
    for linear, dim in linears:
        total += linear.weight.detach().square().sum(1 - dim).view(units, -1).sum(1)
    return total.tolist()


def best(values: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(values)), key=lambda unit: -values[unit])[:count])


@pytest.mark.parametrize(("kv_heads", "n_rep"), [(4, 1), (4, 2), (4, 3), (8, 7)])
def test_base_pruner_removes_the_least_kv_groups_and_channels(kv_heads: int, n_rep: int) -> None:
    dense = tiny_llama(kv_heads=kv_heads, n_rep=n_rep, ffn=20)
    kept = []
    for layer in dense.model.layers:
        a, m = layer.self_attn, layer.mlp
        groups = scores([(a.q_proj, 0), (a.k_proj, 0), (a.v_proj, 0), (a.o_proj, 1)], kv_heads)
        channels = scores([(m.gate_proj, 0), (m.up_proj, 0), (m.down_proj, 1)], 20)
        kept.append((best(groups, kv_heads * 3 // 4), best(channels, 15)))
    reference = masked(dense, kept)
    pruned = step(dense, pruning_ratio=0.25)
    for layer in pruned.model.layers:
        assert layer.self_attn.k_proj.weight.shape == (kv_heads * 6, dense.config.hidden_size)
        assert layer.self_attn.q_proj.weight.shape == (kv_heads * 6 * n_rep, dense.config.hidden_size)
        assert layer.mlp.down_proj.weight.shape == (dense.config.hidden_size, 15)
    with torch.no_grad():
        expected = reference(token_ids()).logits
        for implementation in ("eager", "sdpa"):
            pruned.set_attn_implementation(implementation)
            logits = pruned(token_ids()).logits
            assert torch.allclose(logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_global_pruning_gives_layers_sizes_of_their_own_and_the_result_reloads(tmp_path: Path) -> None:
    dense = tiny_llama(kv_heads=4, layers=3, ffn=20, attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for parameter in dense.model.layers[1].parameters():
            parameter.mul_(0.2)
    pruned = step(dense, pruning_ratio=0.25, global_pruning=True, isomorphic=True)
    sizes = [layer.num_key_value_heads for layer in pruned.config.per_layer_config]
    assert sum(sizes) == 9 and sizes[1] == 1
    assert sum(layer.intermediate_size for layer in pruned.config.per_layer_config) == 45
    pruned.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is PrunedLlamaForCausalLM
    with torch.no_grad():
        assert torch.equal(loaded(token_ids()).logits, pruned(token_ids()).logits)


def test_a_pruned_model_is_pruned_again() -> None:
    once = step(tiny_llama(kv_heads=4, ffn=20), pruning_ratio=0.25)
    twice = step(once, pruning_ratio=0.2)
    assert [(c.num_attention_heads, c.num_key_value_heads, c.intermediate_size) for c in twice.config.per_layer_config] == [
        (4, 2, 12)
    ] * 2
    assert twice.generate(token_ids(), max_new_tokens=3, eos_token_id=None).shape == (2, 13)


def test_the_only_kv_group_of_a_layer_stays() -> None:
    pruned = step(tiny_llama(kv_heads=1, n_rep=4, ffn=20), pruning_ratio=0.5, global_pruning=True, isomorphic=True)
    assert [layer.num_attention_heads for layer in pruned.config.per_layer_config] == [4, 4]
    with torch.no_grad():
        assert bool(torch.isfinite(pruned(token_ids()).logits).all())


def test_flags_and_attention_are_restored() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    model.set_attn_implementation("sdpa")
    model.model.norm.weight.requires_grad_(False)
    pruned = step(model, pruning_ratio=0.25)
    assert model.config._attn_implementation == pruned.config._attn_implementation == "sdpa"
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight
