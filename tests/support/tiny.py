"""Tiny random Llamas for the tests."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 48


def tiny_config(
    *, kv_heads: int = 2, n_rep: int = 2, head_dim: int = 8, ffn: int = 12, layers: int = 2, **kwargs: Any
) -> LlamaConfig:
    """A small LlamaConfig; its hidden size is not heads * head_dim."""
    heads = kv_heads * n_rep
    defaults: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": heads * 4 if heads > 4 else heads * 8,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "initializer_range": 0.2,
    }
    return LlamaConfig(**(defaults | kwargs))


def tiny_llama(config: LlamaConfig | None = None, *, seed: int = 0, **kwargs: Any) -> LlamaForCausalLM:
    """A float32 Llama in eval mode whose biases and norms are random too (transformers starts them at 0 and 1)."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config or tiny_config(**kwargs)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def token_ids(rows: int = 2, length: int = 10, *, seed: int = 0) -> torch.Tensor:
    """Random ids `(rows, length)` without special tokens."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
