"""Trace which rows and columns of which weight belong to a unit, with torch-pruning's dependency graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import WorkError
from .models import INPUT_PROJECTIONS, OUTPUT_PROJECTION, LayerShape

_QUERY, *_KV_SIDE = INPUT_PROJECTIONS["attention"]
_QUERY_SIDE = (_QUERY, OUTPUT_PROJECTION["attention"])
_FFN = (*INPUT_PROJECTIONS["mlp"], OUTPUT_PROJECTION["mlp"])
_TRACE_TOKENS = 8


@dataclass(frozen=True)
class UnitSlices:
    """Index sets of the units of one layer, read from the dependency graph.

    Attributes:
        kv: `{"self_attn.k_proj": index, "self_attn.v_proj": index}`, `index` int64 of shape `(n_kv, head_dim)`: row g
            holds the output rows of KV head g.
        query: `{"self_attn.q_proj": index, "self_attn.o_proj": index}`, `index` int64 of shape `(n_q, head_dim)`: the
            output rows (`q_proj`) or input columns (`o_proj`) of each query head.
        group_of_query: int64 `(n_q,)`, the KV group that each query head reads.
        ffn: `{"mlp.gate_proj": index, "mlp.up_proj": index, "mlp.down_proj": index}`, int64 of shape `(n_ffn, 1)`.
    """

    kv: Mapping[str, torch.Tensor]
    query: Mapping[str, torch.Tensor]
    group_of_query: torch.Tensor
    ffn: Mapping[str, torch.Tensor]

    def units(self, kind: str) -> dict[str, tuple[int, torch.Tensor]]:
        """Return `{projection: (dim, index)}` of a block, `index` int64 `(n_units, width)`: per KV group or FFN channel."""
        if kind == "mlp":
            return {name: (_dim(name), index) for name, index in self.ffn.items()}
        groups = len(self.kv[_KV_SIDE[0]])
        owned = [self.group_of_query == group for group in range(groups)]
        query = {name: torch.stack([index[mine].flatten() for mine in owned]) for name, index in self.query.items()}
        return {name: (_dim(name), index) for name, index in {**self.kv, **query}.items()}

    def kept(self, kv_groups: tuple[int, ...], query_heads: tuple[int, ...], ffn: tuple[int, ...]) -> dict[str, Any]:
        """Return `{projection: (dim, kept indices)}` for the projections of one layer; dim 0 = rows, 1 = columns."""
        picks = ((self.kv, kv_groups), (self.query, query_heads), (self.ffn, ffn))
        return {
            name: (_dim(name), index[chosen].flatten())
            for table, units in picks
            for chosen in [torch.tensor(units, dtype=torch.long)]
            for name, index in table.items()
        }


def _dim(projection: str) -> int:
    return 1 if projection in OUTPUT_PROJECTION.values() else 0


class GQAIndexMapping:
    """Channel indices across `repeat_kv`: KV head g <-> query heads g * n_rep ... g * n_rep + n_rep - 1.

    Replaces torch-pruning 1.6's own mapping, whose forward direction returns no index at all, so that a K head never
    reaches the query heads that read it. Same constructor and call signature as the original.
    """

    def __init__(self, repeat: int, head_dim: int, reverse: bool = False) -> None:
        self.repeat, self.head_dim, self.reverse = repeat, head_dim, reverse

    def __call__(self, idxs: list[Any]) -> list[Any]:
        from torch_pruning._helpers import _HybridIndex

        n, d = self.repeat, self.head_dim
        mapped: dict[int, int] = {}
        for i in sorted(idxs):
            # KV channels that several query channels lead to are named once, for the first of them
            heads = [i.idx // (n * d)] if self.reverse else [i.idx // d * n + r for r in range(n)]
            for head in heads:
                mapped.setdefault(head * d + i.idx % d, i.root_idx)
        # one order for one set: the walk tells visited index lists apart by their order and would never end
        return [_HybridIndex(idx=idx, root_idx=root) for idx, root in sorted(mapped.items())]


@contextmanager
def gqa_index_mapping() -> Iterator[None]:
    """Within this context torch-pruning follows a Llama's attention correctly.

    `repeat_kv` gets [`GQAIndexMapping`]; the slices and concatenations of rotary embeddings, which act inside a head,
    pass indices on unchanged (torch-pruning takes them for slices and concatenations of channels). The context has to
    be open while a graph is built and while groups are read from it: both renew the mappings.
    """
    from torch_pruning.dependency import index_mapping

    repaired = {
        "_GQAIndexMapping": GQAIndexMapping,
        "update_slice_index_mapping": _unchanged,
        "update_concat_index_mapping": _unchanged,
    }
    originals = {name: getattr(index_mapping, name) for name in repaired}
    for name, value in repaired.items():
        setattr(index_mapping, name, value)
    try:
        yield
    finally:
        for name, value in originals.items():
            setattr(index_mapping, name, value)


def _unchanged(_graph: Any, _node: Any) -> None:
    """Leaves the dependencies of a node without an index mapping."""


def build_dependency_graph(model: nn.Module) -> Any:
    """torch-pruning's `DependencyGraph` of a Llama-family causal LM (any device, meta included), GQA edges repaired.

    The trace runs with eager attention (sdpa hides `repeat_kv`) and with gradients enabled (the graph is read from
    autograd); both are restored afterwards. Call it, and read groups from the result, within [`gqa_index_mapping`].
    """
    import torch_pruning as tp

    with traceable(model), torch.enable_grad():
        return tp.DependencyGraph().build_dependency(model, example_inputs=example_inputs(model), verbose=False)


def example_inputs(model: nn.Module) -> dict[str, Any]:
    device = next(model.parameters()).device
    ids = torch.ones(1, _TRACE_TOKENS, dtype=torch.long, device=device)
    # a 4-D mask is taken as it is; building one needs values, which the meta device has not
    mask = torch.zeros(1, 1, _TRACE_TOKENS, _TRACE_TOKENS, device=device)
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


@contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """Eager attention and a gradient for every parameter; both restored."""
    config: Any = model.config
    attention, frozen = config._attn_implementation, [p for p in model.parameters() if not p.requires_grad]
    model.set_attn_implementation("eager")  # type: ignore[operator]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        model.set_attn_implementation(attention)  # type: ignore[operator]


def trace_units(shapes: tuple[LayerShape, ...]) -> tuple[UnitSlices, ...]:
    """Index sets of every layer of a Llama of these `shapes` (`plan.layer_shapes(config)`).

    Layers of equal shape share one traced object.
    """
    traced = {shape: _trace_layer(shape) for shape in dict.fromkeys(shapes)}
    return tuple(traced[shape] for shape in shapes)


def _trace_layer(shape: LayerShape) -> UnitSlices:
    """Trace a one-layer Llama with the sizes of `shape`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    # an absent block is traced at the smallest size and given no units
    heads, kv_heads, width = shape.query_heads or 1, shape.kv_heads or 1, shape.ffn or 1
    with torch.device("meta"):
        probe = LlamaForCausalLM(
            LlamaConfig(
                # hidden_size only has to pass Llama's own check that heads divide it
                hidden_size=heads * 2,
                head_dim=shape.head_dim,
                num_attention_heads=heads,
                num_key_value_heads=kv_heads,
                intermediate_size=width,
                num_hidden_layers=1,
                vocab_size=2,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    layer: Any = probe.model.layers[0]
    with gqa_index_mapping():
        graph = build_dependency_graph(probe)
        roots = torch.arange(kv_heads * shape.head_dim).view(kv_heads, shape.head_dim).tolist()
        kv = [_members(graph, probe, layer.get_submodule(_KV_SIDE[0]), rows) for rows in roots]
        # FFN edges map index to index: one walk over all channels serves instead of one walk a channel
        ffn = [_members(graph, probe, layer.get_submodule(_FFN[0]), list(range(width)))]
    head_dim = shape.head_dim
    return UnitSlices(
        kv={name: _stack(kv, name, kv_heads, head_dim, shape.kv_heads > 0) for name in _KV_SIDE},
        query={name: _stack(kv, name, heads, head_dim, shape.kv_heads > 0) for name in _QUERY_SIDE},
        group_of_query=torch.arange(shape.kv_heads).repeat_interleave(heads // kv_heads),
        ffn={name: _stack(ffn, name, width, 1, shape.ffn > 0) for name in _FFN},
    )


def _members(graph: Any, model: nn.Module, root: nn.Linear, rows: list[int]) -> dict[str, list[int]]:
    """List what is removed together with `rows` of `root`: `{projection: sorted indices}`."""
    import torch_pruning as tp

    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = {module: name.split("layers.0.")[-1] for name, module in linears.items()}
    members: dict[str, set[int]] = {}
    for item in graph.get_pruning_group(root, tp.prune_linear_out_channels, idxs=rows):
        module = item.dep.target.module
        if module in names:
            members.setdefault(names[module], set()).update(item.idxs)
    return {name: sorted(indices) for name, indices in members.items()}


def _stack(units: list[dict[str, list[int]]], name: str, rows: int, width: int, present: bool) -> torch.Tensor:
    """Stack the traced units to int64 `(rows, width)`, after checking that they partition the weight exactly."""
    flat = [index for unit in units for index in unit.get(name, [])]
    if sorted(flat) != list(range(rows * width)):
        raise WorkError(
            f"the dependency graph assigns {len(set(flat))} of {rows * width} channels of {name} to units; this version of "
            "torch-pruning does not trace this attention: install torch-pruning 1.6.1"
        )
    return torch.tensor(flat if present else [], dtype=torch.long).view(-1, width)
