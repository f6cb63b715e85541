"""Write a plain Llama checkpoint, for engines whose layers all have the same sizes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import SAFETENSORS_INDEX_FILE as INDEX

from ..checkpoint import (
    LOG_FILE,
    Checkpoint,
    ShardWriter,
    copy_carried_files,
    fingerprint_of_digests,
    read_identity,
    write_identity,
)
from ..errors import UsageError
from ..models import (
    INPUT_PROJECTIONS,
    OUTPUT_PROJECTION,
    LayerShape,
    ModelShape,
    empty_model,
    expected_tensors,
    layer_prefix,
)
from ..utils import check_disk_space, new_folder, write_json
from .source import Exported, Source

#: of our own config, and of what follows from its class
_OWN_KEYS = ("model_type", "architectures", "auto_map", "per_layer_config", "layer_types", "transformers_version")


def write_plain_llama(source: Source, target: Path, *, pad: bool, overwrite: bool) -> Exported:
    """Write `LlamaForCausalLM` to the folder `target`; see `export`."""
    size = common_shape(source.shape)
    if not pad and any(layer != size for layer in source.shape.layers):
        raise UsageError(_refusal(source, size))
    config = _plain_config(source, size)
    tensors = expected_tensors(empty_model(config).to(source.folder.dtype))
    added = ModelShape.from_config(config).cost.parameters - source.shape.cost.parameters
    with new_folder(target, overwrite) as scratch:
        parameters = sum(tensor.numel() for tensor in tensors.values())
        writer = ShardWriter(scratch, tensors, "50GB", parameters)
        check_disk_space(target, sum(writer.files.values()), "the exported weights")
        config.save_pretrained(scratch)
        if writer.index is not None:
            write_json(scratch / INDEX, writer.index)
        with source.folder.tensors as checkpoint, writer:
            for name, tensor in tensors.items():
                pieces = _pieces(checkpoint, name, tensor, source, size)
                writer.write(name, (rows.to(source.folder.dtype) for rows in pieces))
            writer.sync()
        copy_carried_files(source.folder, scratch, LOG_FILE)
        write_identity(
            scratch, **{**(read_identity(source.folder.path) or {}), "fingerprint": fingerprint_of_digests(writer.digests)}
        )
    note = f"every layer has {size.query_heads} query / {size.kv_heads} KV heads and FFN {size.ffn}"
    if added:
        note += f"; {added:,} parameters come back as zeros ({added / source.shape.cost.parameters:.1%}), outputs are equal"
    return Exported(target, added, (note,))


def common_shape(shape: ModelShape) -> LayerShape:
    """Find the cheapest sizes of a plain Llama that every layer can be padded to.

    All layers have the same, each KV group as many query heads as the largest, and transformers accepts a plain Llama only
    if its query heads divide `hidden_size`, whatever `head_dim` is.

    Raises:
        UsageError: no number of heads does.
    """
    kv_heads = max(layer.kv_heads for layer in shape.layers)
    n_rep = max(layer.n_rep for layer in shape.layers)
    fitting = [
        (groups * (heads + 1), groups, heads)
        for groups in range(kv_heads, shape.hidden_size + 1)
        for heads in range(n_rep, shape.hidden_size // groups + 1)
        if shape.hidden_size % (groups * heads) == 0
    ]
    if not fitting:
        raise UsageError(
            f"{kv_heads * n_rep} query heads are more than hidden_size={shape.hidden_size} of a plain Llama has room for: "
            "choose --to gguf"
        )
    _, kv_heads, n_rep = min(fitting)
    # transformers builds no Llama without FFN
    return LayerShape(kv_heads * n_rep, kv_heads, max(1, *(layer.ffn for layer in shape.layers)), shape.layers[0].head_dim)


def _refusal(source: Source, size: LayerShape) -> str:
    index, layer = next((i, layer) for i, layer in enumerate(source.shape.layers) if layer != size)
    padded = ModelShape.from_config(_plain_config(source, size)).cost.parameters - source.shape.cost.parameters
    return (
        f"{source.folder}: layer {index} has {layer.query_heads} query / {layer.kv_heads} KV heads and FFN {layer.ffn}; a "
        f"plain Llama has the same in every layer, and query heads that divide hidden_size={source.shape.hidden_size}: "
        f"--pad makes them {size.query_heads} / {size.kv_heads} and {size.ffn} with {padded:,} zeros "
        f"({padded / source.shape.cost.parameters:.1%}), or choose --to gguf"
    )


def _plain_config(source: Source, size: LayerShape) -> Any:
    from transformers import LlamaConfig

    kept = {key: value for key, value in source.folder.config.to_dict().items() if key not in _OWN_KEYS}
    heads = {"num_attention_heads": size.query_heads, "num_key_value_heads": size.kv_heads}
    config = LlamaConfig(**{**kept, **heads, "intermediate_size": size.ffn, "head_dim": size.head_dim})
    config.dtype = source.folder.dtype
    config.architectures = ["LlamaForCausalLM"]
    return config


def _pieces(
    checkpoint: Checkpoint, name: str, tensor: torch.Tensor, source: Source, size: LayerShape
) -> Iterator[torch.Tensor]:
    """Yield the `tensor` called `name` of the plain model, in pieces of whole rows."""
    if not name.startswith("model.layers."):
        yield from checkpoint.chunks(name)
        return
    index = int(name.split(".")[2])
    layer, inner = source.shape.layers[index], name.removeprefix(layer_prefix(index))
    if name not in checkpoint.tensors:
        # of a removed block, whose norm has no influence
        yield torch.full(tensor.shape, 1.0 if inner.endswith("norm.weight") else 0.0)
    elif layer == size or inner.endswith("norm.weight"):
        yield from checkpoint.chunks(name)
    else:
        yield _filled_up(checkpoint.read(name), inner, layer, size)


def _filled_up(weight: torch.Tensor, inner: str, layer: LayerShape, size: LayerShape) -> torch.Tensor:
    """Pad a weight or bias of `layer` with zeros to the block sizes of `size`."""
    module, _, kind = inner.rpartition(".")
    output = module in OUTPUT_PROJECTION.values()
    if output and kind == "bias":
        return weight
    # units lie along the columns of an output projection
    rows = weight.T if output else weight
    had, has = _grouping(module, layer), _grouping(module, size)
    filled = rows.new_zeros(*has, *rows.shape[1:])
    filled[tuple(slice(count) for count in had)] = rows.reshape(*had, *rows.shape[1:])
    filled = filled.flatten(0, len(has) - 1)
    return filled.T.contiguous() if output else filled


def _grouping(module: str, layer: LayerShape) -> tuple[int, ...]:
    """Return how the units of a projection lie along its units' dimension, outermost first."""
    if module.startswith("mlp."):
        return (layer.ffn,)
    if module in (INPUT_PROJECTIONS["attention"][0], OUTPUT_PROJECTION["attention"]):
        return layer.kv_heads, layer.n_rep, layer.head_dim
    return layer.kv_heads, layer.head_dim
