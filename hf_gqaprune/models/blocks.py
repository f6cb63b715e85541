"""Name the modules of the attention and the FFN block of a decoder layer."""

from __future__ import annotations

KINDS = ("attention", "mlp")
#: block kind -> the layer's modules for the block and for the norm before it
BLOCK_MODULES = {"attention": ("self_attn", "input_layernorm"), "mlp": ("mlp", "post_attention_layernorm")}
#: block kind -> the projections whose output rows belong to units; attention: query, key, value
INPUT_PROJECTIONS = {
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp": ("mlp.gate_proj", "mlp.up_proj"),
}
#: block kind -> the projection whose input columns belong to units
OUTPUT_PROJECTION = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}
