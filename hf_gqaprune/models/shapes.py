"""Describe the sizes of a Llama and compute its parameters, KV cache and FLOPs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .blocks import KINDS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Key = tuple[int, str]
_DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def unit_parameters(shape: ModelShape) -> dict[Key, int]:
    """Return the parameters of one KV group or one FFN channel of every present block, biases included."""
    sizes: dict[Key, int] = {}
    for index, layer in enumerate(shape.layers):
        if layer.kv_heads:
            heads = layer.n_rep * shape.query_head_parameters(layer)
            sizes[index, "attention"] = heads + shape.kv_head_parameters(layer)
        if layer.ffn:
            sizes[index, "mlp"] = shape.channel_parameters
    return sizes


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one decoder layer; a block that is absent has zero heads or zero width."""

    query_heads: int
    kv_heads: int
    ffn: int
    head_dim: int

    @property
    def n_rep(self) -> int:
        """Query heads that read one KV head (0 without attention)."""
        return self.query_heads // self.kv_heads if self.kv_heads else 0

    @property
    def skip(self) -> list[str]:
        """Absent blocks, as `per_layer_config` names them."""
        return [name for name, size in (("attention", self.kv_heads), ("mlp", self.ffn)) if not size]


@dataclass(frozen=True)
class ModelShape:
    """Everything the cost of a Llama depends on."""

    hidden_size: int
    vocab_size: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    dtype: str
    layers: tuple[LayerShape, ...]

    @staticmethod
    def from_config(config: PreTrainedConfig) -> ModelShape:
        """Read the sizes of a Llama or pruned Llama config; raises [`UsageError`] for any other architecture."""
        model_type = getattr(config, "model_type", None)
        if model_type not in ("llama", "pruned_llama"):
            raise UsageError(f"{model_type!r} is not a Llama-shaped model: give a model of type llama or pruned_llama")
        c: Any = config
        return ModelShape(
            hidden_size=c.hidden_size,
            vocab_size=c.vocab_size,
            tie_word_embeddings=bool(c.tie_word_embeddings),
            attention_bias=bool(c.attention_bias),
            mlp_bias=bool(c.mlp_bias),
            dtype=str(c.dtype or "float32").removeprefix("torch."),
            layers=layer_shapes(config),
        )

    def query_head_parameters(self, layer: LayerShape) -> int:
        """Return the parameters of one query head: rows of `q_proj` and their bias, columns of `o_proj`."""
        return layer.head_dim * (2 * self.hidden_size + self.attention_bias)

    def kv_head_parameters(self, layer: LayerShape) -> int:
        """Return the parameters of one key head and one value head, biases included."""
        return 2 * layer.head_dim * (self.hidden_size + self.attention_bias)

    @property
    def channel_parameters(self) -> int:
        """Return the parameters of one FFN channel: rows of `gate_proj` and `up_proj`, column of `down_proj`."""
        return 3 * self.hidden_size + 2 * self.mlp_bias

    @property
    def blocks(self) -> list[Key]:
        """`(layer, kind)` of every block that is present."""
        return [(index, kind) for index, layer in enumerate(self.layers) for kind in KINDS if kind not in layer.skip]

    def attention_parameters(self, layer: LayerShape) -> int:
        """Return the parameters of the attention block of `layer`, its norm included (0 if absent)."""
        if not layer.kv_heads:
            return 0
        heads = layer.query_heads * self.query_head_parameters(layer) + layer.kv_heads * self.kv_head_parameters(layer)
        return heads + self.hidden_size * (1 + self.attention_bias)

    def mlp_parameters(self, layer: LayerShape) -> int:
        """Return the parameters of the FFN of `layer`, its norm included (0 if absent)."""
        return layer.ffn * self.channel_parameters + self.hidden_size * (1 + self.mlp_bias) if layer.ffn else 0

    @property
    def cost(self) -> Cost:
        """Exact parameters, KV-cache bytes and FLOPs of this model."""
        backbone = sum(self.attention_parameters(layer) + self.mlp_parameters(layer) for layer in self.layers)
        embeddings = self.vocab_size * self.hidden_size
        kv = sum(2 * layer.kv_heads * layer.head_dim for layer in self.layers)
        macs = sum(
            self.hidden_size * (2 * (layer.query_heads + layer.kv_heads) * layer.head_dim + 3 * layer.ffn)
            for layer in self.layers
        )
        return Cost(
            parameters=backbone + embeddings * (1 if self.tie_word_embeddings else 2) + self.hidden_size,
            backbone_parameters=backbone,
            kv_bytes_per_token=kv * _DTYPE_BYTES.get(self.dtype, 2),
            flops_per_token=2 * (macs + embeddings),
        )


@dataclass(frozen=True)
class Cost:
    """Size of a model.

    Attributes:
        parameters: all of them; tied embeddings count once.
        backbone_parameters: those of the decoder layers, their norms included.
        kv_bytes_per_token: bytes of KV cache per token, in the model's dtype.
        flops_per_token: multiplications and additions of the linear layers and the head; attention scores, which grow
            with the context, are left out.
    """

    parameters: int
    backbone_parameters: int
    kv_bytes_per_token: int
    flops_per_token: int


def layer_shapes(config: PreTrainedConfig) -> tuple[LayerShape, ...]:
    """Read the sizes of every layer of a Llama or pruned Llama config, skipped blocks as zeros."""
    shapes = []
    for layer in config.per_layer_config:
        c: Any = layer
        skip = getattr(c, "skip", ())
        heads, kv_heads = (0, 0) if "attention" in skip else (c.num_attention_heads, c.num_key_value_heads)
        shapes.append(LayerShape(heads, kv_heads, 0 if "mlp" in skip else c.intermediate_size, c.head_dim))
    return tuple(shapes)
