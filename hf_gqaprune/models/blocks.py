"""Name the modules of the attention and the FFN block of a decoder layer."""

from __future__ import annotations

KINDS = ("attention", "mlp")
#: block kind -> the projection whose input columns are the units' outputs
OUTPUT_PROJECTION = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}
#: block kind -> the layer's modules for the block and for the norm before it
BLOCK_MODULES = {"attention": ("self_attn", "input_layernorm"), "mlp": ("mlp", "post_attention_layernorm")}
