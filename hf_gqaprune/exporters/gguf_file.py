"""Write a GGUF file, the format of llama.cpp, from a checkpoint whose layers may differ."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError, WorkError, unknown
from ..utils import check_disk_space, new_file, refuse_existing, write_text
from .gguf_tensors import (
    GGUF_DTYPES,
    GGUFTensor,
    encode,
    encoding,
    gguf_tensors,
    rope_factors,
    rope_tensor,
    stored_shape,
)
from .gguf_tokenizer import converted_tokenizer, copied_tokenizer
from .modelfile import modelfile
from .source import Exported, Source


def write_gguf(
    source: Source, target: Path, *, dtype: str, tokenizer_from: str | os.PathLike[str] | None, overwrite: bool
) -> Exported:
    """Write `target` and an ollama Modelfile beside it; see `export`."""
    if importlib.util.find_spec("gguf") is None:
        raise UsageError("GGUF export needs the gguf package: pip install 'hf_gqaprune[gguf]'")
    if dtype == "auto":
        dtype = next((name for name, stored in GGUF_DTYPES.items() if stored == source.folder.dtype), "f32")
    elif dtype not in GGUF_DTYPES:
        raise unknown("dtype", dtype, ["auto", *GGUF_DTYPES])
    ollama = refuse_existing(target.with_suffix(".Modelfile"), overwrite, file=True)
    vocabulary = source.shape.vocab_size
    config: Any = source.folder.config
    if tokenizer_from is None:
        tokenizer = converted_tokenizer(source.folder, vocabulary)
    else:
        tokenizer = copied_tokenizer(Path(tokenizer_from), vocabulary)
    factors, scale = rope_factors(source)
    tensors = gguf_tensors(source)
    added = sum(math.prod(tensor.shape) for tensor in tensors) - source.shape.cost.parameters
    if factors is not None:
        tensors.append(rope_tensor(factors))
    check_disk_space(target, sum(_size(tensor, dtype) for tensor in tensors), "the exported weights")
    keys = _model_keys(source, dtype, scale) | tokenizer
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    with new_file(target) as scratch:
        _write(scratch, keys, tensors, source, dtype)
        # another may have come by now
        refuse_existing(target, overwrite, file=True)
    write_text(ollama, modelfile(target.name, tokenizer, config.max_position_embeddings))
    return Exported(target, added, tuple(_notes(source, tensors, dtype, added, ollama)))


def _architecture(source: Source) -> str:
    """llama.cpp's `llama` where all layers agree, else `deci`, its only Llama whose layers may differ."""
    return "llama" if len({stored_shape(layer) for layer in source.shape.layers}) == 1 else "deci"


def _model_keys(source: Source, dtype: str, scale: float) -> dict[str, Any]:
    """Keys of the header that describe the model; `{arch}` is filled in by the writer of the file."""
    from gguf import GGML_QUANT_VERSION, Keys, LlamaFileType

    config: Any = source.folder.config
    layers = [stored_shape(layer) for layer in source.shape.layers]
    head_dim = layers[0].head_dim
    kind = "ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"
    return {
        Keys.General.TYPE: "model",
        Keys.General.NAME: source.folder.path.resolve().name,
        Keys.General.FILE_TYPE: int(LlamaFileType[kind]),
        Keys.General.QUANTIZATION_VERSION: GGML_QUANT_VERSION,
        Keys.LLM.VOCAB_SIZE: source.shape.vocab_size,
        Keys.LLM.CONTEXT_LENGTH: config.max_position_embeddings,
        Keys.LLM.EMBEDDING_LENGTH: source.shape.hidden_size,
        Keys.LLM.BLOCK_COUNT: len(layers),
        Keys.LLM.FEED_FORWARD_LENGTH: _one_or_all([layer.ffn for layer in layers]),
        Keys.Attention.HEAD_COUNT: _one_or_all([layer.query_heads for layer in layers]),
        Keys.Attention.HEAD_COUNT_KV: _one_or_all([layer.kv_heads for layer in layers]),
        # derived from the heads of layer 0 where they are absent
        Keys.Attention.KEY_LENGTH: head_dim,
        Keys.Attention.VALUE_LENGTH: head_dim,
        Keys.Attention.LAYERNORM_RMS_EPS: float(config.rms_norm_eps),
        Keys.Rope.DIMENSION_COUNT: head_dim,
        Keys.Rope.FREQ_BASE: float(config.rope_parameters["rope_theta"]),
        # the scaling is in rope_freqs.weight
        Keys.Rope.SCALING_TYPE: "none",
        Keys.Rope.SCALING_ATTN_FACTOR: scale,
    }


def _one_or_all(sizes: list[int]) -> int | list[int]:
    return sizes[0] if len(set(sizes)) == 1 else sizes


def _write(path: Path, keys: Mapping[str, Any], tensors: Iterable[GGUFTensor], source: Source, dtype: str) -> None:
    """Write header and tensors to `path`, reading one tensor at a time. Raises [`WorkError`] where that fails."""
    from gguf import GGUFWriter

    architecture = _architecture(source)
    writer = GGUFWriter(path, architecture)
    for key, value in keys.items():
        writer.add_key_value(key.format(arch=architecture), value, _value_type(value))
    for tensor in tensors:
        # the dtype of the array is looked at only where no raw_dtype is given
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), _size(tensor, dtype), raw_dtype=encoding(tensor, dtype)
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        stream = next(iter(writer.fout or ()))
        writer.write_padding(stream, stream.tell())
        with source.folder.tensors as checkpoint:
            for tensor in tensors:
                for rows in tensor.pieces(checkpoint):
                    stream.write(encode(tensor.name, rows, encoding(tensor, dtype)))
                writer.write_padding(stream, stream.tell())
        stream.flush()
        os.fsync(stream.fileno())
    except OSError as error:
        raise WorkError(f"cannot write {path}: {error.strerror}") from error
    finally:
        writer.close()


def _value_type(value: Any) -> Any:
    from gguf import GGUFValueType

    if isinstance(value, bool | str | float | list):
        return GGUFValueType.get_type(value)
    return GGUFValueType.UINT32


def _size(tensor: GGUFTensor, dtype: str) -> int:
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[encoding(tensor, dtype)]
    return math.prod(tensor.shape) // block * size


def _notes(source: Source, tensors: list[GGUFTensor], dtype: str, added: int, ollama: Path) -> Iterable[str]:
    yield f"architecture {_architecture(source)}, matrices {dtype}; ollama reads {ollama.name}"
    skipped = sum(len(layer.skip) for layer in source.shape.layers)
    if skipped:
        yield f"{skipped} removed blocks are stored as blocks of zeros, {added:,} parameters, which llama.cpp needs"
    fallen = [tensor for tensor in tensors if len(tensor.shape) > 1 and encoding(tensor, dtype).name.lower() != dtype]
    if fallen:
        yield (
            f"{len(fallen)} matrices are f16, because {dtype} needs rows of a multiple of 32 "
            f"({fallen[0].name} has {fallen[0].shape[-1]})"
        )
