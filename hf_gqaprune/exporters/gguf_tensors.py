"""List the tensors of a GGUF file and encode them, a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint import Checkpoint
from ..errors import UsageError, WorkError, unknown
from ..models import LayerShape, layer_prefix
from .source import Source

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

#: name on the command line -> dtype of the checkpoint that it stands for under `auto`
GGUF_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "q8_0": None}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
#: RoPE types whose frequencies do not depend on the length of the text
_FIXED_ROPE = ("default", "linear", "yarn", "llama3")
#: what a removed block becomes: llama.cpp loads no layer without attention or FFN, or computes it wrong
STUB_FFN = 32

Pieces = Callable[[Checkpoint], Iterator[torch.Tensor]]


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of the file: `pieces` reads it as consecutive blocks of rows."""

    name: str
    shape: tuple[int, ...]
    pieces: Pieces


def stored_shape(layer: LayerShape) -> LayerShape:
    """Return the sizes of a layer in the file, where a removed block has the sizes of its stub."""
    heads, kv_heads = (layer.query_heads, layer.kv_heads) if layer.kv_heads else (1, 1)
    return LayerShape(heads, kv_heads, layer.ffn or STUB_FFN, layer.head_dim)


def gguf_tensors(source: Source) -> list[GGUFTensor]:
    """Every weight of the checkpoint under its GGUF name, q and k in the order that llama.cpp's RoPE expects.

    A removed block becomes a stub whose output is exactly zero: one query and one KV head, or an FFN of 32, of zeros.
    """
    tensors = []
    for name, tensor in source.tensors.items():
        if not name.startswith("model.layers."):
            tensors.append(_stored(name, _renamed(name, _OUTER), tensor))
    for index, layer in enumerate(source.shape.layers):
        prefix = layer_prefix(index)
        for name, tensor in source.tensors.items():
            if name.startswith(prefix):
                inner = name.removeprefix(prefix)
                heads = {"q": layer.query_heads, "k": layer.kv_heads}.get(inner.removeprefix("self_attn.")[0], 0)
                tensors.append(_stored(name, f"blk.{index}.{_renamed(inner, _INNER)}", tensor, heads))
        tensors += [_constant(f"blk.{index}.{name}", tensor) for name, tensor in _stubs(layer, source.shape.hidden_size)]
    return tensors


def rope_factors(source: Source) -> tuple[torch.Tensor | None, float]:
    """Divisors `(head_dim / 2,)` of the plain RoPE frequencies, and the scale of cosine and sine, as transformers has them.

    The divisors are None where the frequencies are plain. All fixed scalings (linear, YaRN, Llama 3) are written so, and
    llama.cpp's own formulas for them are not used.

    Raises:
        UsageError: a RoPE type whose frequencies depend on the length of the text.
    """
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config: Any = source.folder.config
    parameters = config.rope_parameters
    if parameters["rope_type"] not in _FIXED_ROPE:
        raise unknown("RoPE type for GGUF", parameters["rope_type"], _FIXED_ROPE)
    rotary = LlamaRotaryEmbedding(config=config.per_layer_config[0])
    dim = source.shape.layers[0].head_dim
    plain = 1.0 / (parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    if rotary.inv_freq.shape != plain.shape:
        raise UsageError(f"{source.folder}: RoPE on a part of each head has no form in GGUF: serve it by transformers")
    factors = None if parameters["rope_type"] == "default" else plain / rotary.inv_freq
    return factors, float(rotary.attention_scaling)


def rope_tensor(factors: torch.Tensor) -> GGUFTensor:
    """Return the factors by which llama.cpp divides its RoPE frequencies."""
    return _constant("rope_freqs.weight", factors)


def encoding(tensor: GGUFTensor, dtype: str) -> GGMLQuantizationType:
    """Type that a tensor is stored as: `dtype` for matrices, F16 where Q8_0 does not divide the rows, F32 for vectors."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(tensor.shape) == 1:
        return GGMLQuantizationType.F32
    wanted = GGMLQuantizationType[dtype.upper()]
    return GGMLQuantizationType.F16 if tensor.shape[-1] % GGML_QUANT_SIZES[wanted][0] else wanted


def encode(name: str, rows: torch.Tensor, kind: GGMLQuantizationType) -> bytes:
    """Encode rows as `kind`. Raises [`WorkError`] for values that are not finite, or too large for float16."""
    import numpy as np
    from gguf import GGMLQuantizationType, quants

    values = rows.float().numpy()
    if not np.isfinite(values).all():
        raise WorkError(f"{name} holds values that are not finite; repair the checkpoint first")
    if kind is GGMLQuantizationType.F16 and abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise WorkError(f"{name} holds {abs(values).max():.4g}, more than float16 can: choose dtype bf16 or f32")
    return quants.quantize(values, kind).tobytes()


def _stored(stored: str, name: str, tensor: torch.Tensor, heads: int = 0) -> GGUFTensor:
    def pieces(checkpoint: Checkpoint) -> Iterator[torch.Tensor]:
        if heads:
            yield _interleaved(checkpoint.read(stored), heads)
        else:
            yield from checkpoint.chunks(stored)

    return GGUFTensor(name, tuple(tensor.shape), pieces)


def _constant(name: str, tensor: torch.Tensor) -> GGUFTensor:
    return GGUFTensor(name, tuple(tensor.shape), lambda _: iter([tensor]))


def _interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Order the rows of each head in pairs (0, d/2, 1, d/2 + 1, ...): llama.cpp rotates neighbours, transformers halves."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _renamed(name: str, names: dict[str, str]) -> str:
    module, _, kind = name.rpartition(".")
    return f"{names[module]}.{kind}"


def _stubs(layer: LayerShape, hidden: int) -> Iterator[tuple[str, torch.Tensor]]:
    if not layer.kv_heads:
        yield "attn_norm.weight", torch.ones(hidden)
        for name in ("attn_q.weight", "attn_k.weight", "attn_v.weight"):
            yield name, torch.zeros(layer.head_dim, hidden)
        yield "attn_output.weight", torch.zeros(hidden, layer.head_dim)
    if not layer.ffn:
        yield "ffn_norm.weight", torch.ones(hidden)
        for name in ("ffn_gate.weight", "ffn_up.weight"):
            yield name, torch.zeros(STUB_FFN, hidden)
        yield "ffn_down.weight", torch.zeros(hidden, STUB_FFN)
