"""Index sets of units: those of the attention's own arithmetic, and those that torch-pruning's graph prunes."""

from __future__ import annotations

import pytest
import torch
from support.tiny import tiny_config, tiny_llama
from torch import nn
from transformers import PreTrainedConfig

from hf_gqaprune.dependency_graph import _stack, build_dependency_graph, gqa_index_mapping, trace_units
from hf_gqaprune.errors import WorkError
from hf_gqaprune.models.shapes import LayerShape, layer_shapes

SHAPES = [(1, 1, 8), (1, 3, 16), (2, 2, 8), (3, 1, 4), (2, 3, 64), (4, 4, 8), (2, 7, 8), (1, 8, 32), (4, 8, 16)]


def trace(config: PreTrainedConfig):
    return trace_units(layer_shapes(config))


@pytest.mark.parametrize(("kv_heads", "n_rep", "head_dim"), SHAPES)
def test_units_follow_repeat_kv(kv_heads: int, n_rep: int, head_dim: int) -> None:
    config = tiny_config(kv_heads=kv_heads, n_rep=n_rep, head_dim=head_dim, ffn=5, layers=1)
    (units,) = trace(config)
    kv = torch.arange(kv_heads * head_dim).view(kv_heads, head_dim)
    query = torch.arange(kv_heads * n_rep * head_dim).view(-1, head_dim)
    assert {name: index.tolist() for name, index in units.kv.items()} == {
        "self_attn.k_proj": kv.tolist(),
        "self_attn.v_proj": kv.tolist(),
    }
    assert {name: index.tolist() for name, index in units.query.items()} == {
        "self_attn.q_proj": query.tolist(),
        "self_attn.o_proj": query.tolist(),
    }
    assert units.group_of_query.tolist() == [head // n_rep for head in range(kv_heads * n_rep)]
    assert {name: index.tolist() for name, index in units.ffn.items()} == {
        name: [[0], [1], [2], [3], [4]] for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }


def test_output_columns_by_hand() -> None:
    (units,) = trace(tiny_config(kv_heads=2, n_rep=2, head_dim=2, ffn=3, layers=1))
    assert units.units("attention")["self_attn.o_proj"][1].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert units.units("mlp")["mlp.down_proj"][1].tolist() == [[0], [1], [2]]
    assert units.units("attention")["self_attn.o_proj"][1][1].tolist() == [4, 5, 6, 7]
    kept = {name: (dim, index.tolist()) for name, (dim, index) in units.kept((1,), (2, 3), (0, 2)).items()}
    assert kept == {
        "self_attn.k_proj": (0, [2, 3]),
        "self_attn.v_proj": (0, [2, 3]),
        "self_attn.q_proj": (0, [4, 5, 6, 7]),
        "self_attn.o_proj": (1, [4, 5, 6, 7]),
        "mlp.gate_proj": (0, [0, 2]),
        "mlp.up_proj": (0, [0, 2]),
        "mlp.down_proj": (1, [0, 2]),
    }


@pytest.mark.parametrize(("kv_heads", "n_rep", "head_dim"), [(3, 1, 8), (3, 2, 8), (2, 3, 4), (2, 7, 4), (2, 8, 8)])
@pytest.mark.parametrize("bias", [False, True])
def test_pruning_through_the_graph_equals_index_sets(kv_heads: int, n_rep: int, head_dim: int, bias: bool) -> None:
    import torch_pruning as tp

    model = tiny_llama(kv_heads=kv_heads, n_rep=n_rep, head_dim=head_dim, attention_bias=bias, mlp_bias=bias)
    units = trace(model.config)[0]
    dense = {name: tensor.clone() for name, tensor in model.model.layers[0].state_dict().items()}
    untouched = {name: tensor.clone() for name, tensor in model.model.layers[1].state_dict().items()}
    removed = kv_heads - 1
    with gqa_index_mapping():
        graph = build_dependency_graph(model)
        layer = model.model.layers[0]
        rows = units.kv["self_attn.k_proj"][removed].tolist()
        graph.get_pruning_group(layer.self_attn.k_proj, tp.prune_linear_out_channels, idxs=rows).prune()
        graph.get_pruning_group(layer.mlp.up_proj, tp.prune_linear_out_channels, idxs=[1, 4]).prune()

    groups = tuple(range(kv_heads - 1))
    heads = tuple(range((kv_heads - 1) * n_rep))
    channels = tuple(i for i in range(12) if i not in (1, 4))
    for name, (dim, index) in units.kept(groups, heads, channels).items():
        module = layer.get_submodule(name)
        assert isinstance(module, nn.Linear)
        assert torch.equal(module.weight, dense[f"{name}.weight"].index_select(dim, index)), name
        assert (module.out_features, module.in_features) == tuple(module.weight.shape)
        if bias:
            expected = dense[f"{name}.bias"]
            assert torch.equal(module.bias, expected if dim else expected[index]), name
    for name, tensor in model.model.layers[1].state_dict().items():
        assert torch.equal(tensor, untouched[name]), name


@pytest.mark.parametrize("n_rep", [1, 2, 3, 7])
def test_a_group_is_the_same_from_whichever_projection_it_is_entered(n_rep: int) -> None:
    import torch_pruning as tp

    model = tiny_llama(kv_heads=3, n_rep=n_rep, layers=1)
    attention = model.model.layers[0].self_attn
    kv, query = list(range(8, 16)), list(range(8 * n_rep, 16 * n_rep))
    linears = {attention.q_proj: query, attention.k_proj: kv, attention.v_proj: kv, attention.o_proj: query}
    with gqa_index_mapping():
        graph = build_dependency_graph(model)
        for root, rows in linears.items():
            prune = tp.prune_linear_in_channels if root is attention.o_proj else tp.prune_linear_out_channels
            group = graph.get_pruning_group(root, prune, idxs=rows)
            # sorted, not set: an index that is named twice would be counted twice
            found = {item.dep.target.module: sorted(item.idxs) for item in group}
            assert {linear: found[linear] for linear in linears} == linears


def test_equal_layers_share_one_trace_and_skipped_blocks_are_empty() -> None:
    shapes = (LayerShape(4, 2, 6, 8), LayerShape(0, 0, 6, 8), LayerShape(4, 2, 0, 8), LayerShape(4, 2, 6, 8))
    units = trace_units(shapes)
    assert units[0] is units[3]
    assert [len(u.group_of_query) for u in units] == [4, 0, 4, 4]
    assert units[1].kv["self_attn.k_proj"].shape == (0, 8)
    assert units[1].ffn["mlp.up_proj"].shape == (6, 1)
    assert units[2].ffn["mlp.down_proj"].shape == (0, 1)
    assert units[2].query["self_attn.o_proj"].shape == (4, 8)


def test_a_trace_leaves_the_model_and_torch_pruning_as_they_were() -> None:
    from torch_pruning.dependency import index_mapping

    names = ("_GQAIndexMapping", "update_slice_index_mapping", "update_concat_index_mapping")
    before = [getattr(index_mapping, name) for name in names]
    model = tiny_llama()
    model.set_attn_implementation("sdpa")
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    with gqa_index_mapping():
        build_dependency_graph(model)
    assert [getattr(index_mapping, name) for name in names] == before
    assert model.config._attn_implementation == "sdpa"
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.layers.0.mlp.up_proj.weight"]


def test_a_graph_that_misses_channels_is_refused() -> None:
    with pytest.raises(WorkError, match="assigns 2 of 4 channels of self_attn.k_proj"):
        _stack([{"self_attn.k_proj": [0, 1]}], "self_attn.k_proj", 2, 2, True)
