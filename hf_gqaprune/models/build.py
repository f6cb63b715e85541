"""Build a pruned model from a config of layer sizes and the weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..utils import dispatch
from .configuration_pruned_llama import PrunedLlamaConfig
from .modeling_pruned_llama import PrunedLlamaForCausalLM
from .shapes import LayerShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def config_of_layers(config: Any, shapes: Sequence[LayerShape], **values: Any) -> PrunedLlamaConfig:
    """Derive a config with layers of these `shapes`: global values are kept, layers that differ go to `per_layer_config`."""
    kept = config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "per_layer_config", "layer_types", "transformers_version"):
        kept.pop(key, None)
    layers = {}
    for index, shape in enumerate(shapes):
        sizes: dict[str, Any] = {}
        if shape.kv_heads:
            sizes |= {"num_attention_heads": shape.query_heads, "num_key_value_heads": shape.kv_heads}
        if shape.ffn:
            sizes["intermediate_size"] = shape.ffn
        if shape.skip:
            sizes["skip"] = shape.skip
        layers[index] = sizes
    return PrunedLlamaConfig(**{**kept, **values}, per_layer_config=layers)


def assemble(
    model: PreTrainedModel, config: PrunedLlamaConfig, state: dict[str, torch.Tensor]
) -> PrunedLlamaForCausalLM:
    """Build a pruned model from the tensors of `state`, in eval mode, set up like `model`.

    Args:
        model: has the attention implementation and the generation config to use.
        config: the sizes of `state`.
        state: every weight but a tied head; not copied.

    Raises:
        RuntimeError: a weight is missing or not part of the model.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        pruned: PrunedLlamaForCausalLM = PrunedLlamaForCausalLM(config)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    pruned.load_state_dict(state, assign=True)
    pruned.tie_weights()
    pruned.set_attn_implementation(model.config._attn_implementation)
    pruned.model.rotary_emb.to(state["model.embed_tokens.weight"].device)
    pruned.generation_config = copy.deepcopy(model.generation_config)
    for parameter in pruned.parameters():
        parameter.requires_grad_(True)
    dispatch(pruned, getattr(model, "hf_device_map", {}))
    pruned.eval()
    return pruned
