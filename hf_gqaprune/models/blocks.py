"""TODO."""

from __future__ import annotations

KINDS = ("attention", "mlp")
#: block kind -> the projection whose input columns are the units' outputs
OUTPUT_PROJECTION = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}
