"""Find which rows and columns of which weight belong to which unit, from a Llama config.

The answer is read from torch-pruning's dependency graph, traced through the real attention on the meta device. It is the
only place that knows how a layer is cut: surgery, statistics and criteria replay these index sets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from .dependency_graph import example_inputs, gqa_index_mapping, traceable
from .models import INPUT_PROJECTIONS, LayerShape, PrunedLlamaForCausalLM, assemble, config_of_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class KVGroups:
    """What torch-pruning's own `BasePruner` lacks to prune a Llama by whole KV groups; see [`kv_group_pruning`].

    Attributes:
        options: keyword arguments for `BasePruner`: the example inputs, and which layers keep their outputs.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        from torch_pruning._helpers import UnwrappedParameters

        inner: Any = model.get_decoder()
        attentions = [layer.self_attn for layer in inner.layers if layer.self_attn is not None]
        names = [name.rpartition(".")[2] for name in INPUT_PROJECTIONS["attention"]]
        self._attention = {a.get_submodule(name): a for a in attentions for name in names}
        norms = [module.weight for module in inner.modules() if hasattr(module, "variance_epsilon")]
        self.options = {
            "example_inputs": example_inputs(model),
            # the hidden size stays: no group that reaches the embeddings or the head is pruned
            "ignored_layers": [model.get_input_embeddings(), model.get_output_embeddings()],
            "unwrapped_parameters": [UnwrappedParameters(parameters=weight, pruning_dim=0) for weight in norms],
            # the defaults are two dicts that all pruners of a process share
            "in_channel_groups": {},
            "out_channel_groups": {},
        }

    def importance(self, base: Callable[[Any], torch.Tensor]) -> Callable[[Any], torch.Tensor]:
        """Sum an importance of torch-pruning over each KV group, so that all channels of a group rank alike."""

        def score(group: Any) -> torch.Tensor:
            channels = base(group)
            units = self._units(group)
            if units is None:
                return channels
            return channels.view(units, -1).sum(1).repeat_interleave(len(channels) // units)

        return score

    def whole(self, groups: Iterable[Any]) -> Iterator[Any]:
        """torch-pruning's groups with attention rounded to whole KV groups; the last one of a layer stays.

        Args:
            groups: what `pruner.step(interactive=True)` yields.
        """
        for group in groups:
            units = self._units(group)
            if units is None:
                yield group
                continue
            root, handler, indices = group[0].dep.target.module, group[0].dep.handler, group[0].idxs
            width = root.out_features // units
            chosen = (torch.tensor(indices, dtype=torch.long) // width).bincount(minlength=units)
            count = min(units - 1, (2 * len(indices) + width) // (2 * width))
            if count:
                rows = torch.arange(units * width).view(units, width)[chosen.argsort(descending=True, stable=True)[:count]]
                yield group._DG.get_pruning_group(root, handler, sorted(rows.flatten().tolist()))

    def _units(self, group: Any) -> int | None:
        """Number of KV groups where `group` is that of an attention block."""
        attention = self._attention.get(group[0].dep.target.module)
        return None if attention is None else attention.k_proj.out_features // attention.head_dim


@contextmanager
def kv_group_pruning(model: PreTrainedModel) -> Iterator[KVGroups]:
    """Within this context torch-pruning's own `BasePruner` prunes whole KV groups and FFN channels of a Llama.

    ```python
    with kv_group_pruning(model) as gqa:
        importance = gqa.importance(tp.importance.MagnitudeImportance(p=2, group_reduction="sum", normalizer=None))
        pruner = tp.pruner.BasePruner(model, importance=importance, pruning_ratio=0.25, **gqa.options)
        for group in gqa.whole(pruner.step(interactive=True)):
            group.prune()
    pruned = to_pruned_llama(model)
    ```

    Args:
        model: a Llama or pruned Llama causal LM. Its weights are pruned in place, its config is not: see
            [`to_pruned_llama`]. Meanwhile it runs eager attention and all its parameters take gradients.
    """
    with gqa_index_mapping(), traceable(model):
        yield KVGroups(model)


def to_pruned_llama(model: PreTrainedModel) -> PrunedLlamaForCausalLM:
    """Wrap the same weights in a [`PrunedLlamaForCausalLM`] whose config has the layers' real sizes.

    Args:
        model: a Llama or pruned Llama causal LM after pruning by whole KV groups in place; it shares its weights with
            the result.
    """
    config, inner = model.config, model.get_decoder()
    shapes = []
    for layer, before in zip(inner.layers, config.per_layer_config, strict=True):
        attention, mlp, d = layer.self_attn, layer.mlp, before.head_dim
        query, kv = (0, 0) if attention is None else (attention.q_proj.out_features, attention.k_proj.out_features)
        shapes.append(LayerShape(query // d, kv // d, 0 if mlp is None else mlp.up_proj.out_features, d))
    pruned = assemble(model, config_of_layers(config, shapes), dict(model.state_dict()))
    pruned.train(model.training)
    return pruned
