"""Export a checkpoint to the format that an engine loads."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import UsageError, unknown
from ..utils import refuse_existing, refuse_overwriting_inputs
from .gguf_file import write_gguf
from .plain_llama import write_plain_llama
from .source import Exported, Source

FORMATS = ("gguf", "llama")


def export(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    to: str = "gguf",
    *,
    dtype: str = "auto",
    tokenizer_from: str | os.PathLike[str] | None = None,
    pad: bool = False,
    overwrite: bool = False,
) -> Exported:
    """Export a Llama or pruned Llama checkpoint for another engine, one tensor in memory at a time.

    Args:
        model: folder or Hub id of a safetensors checkpoint; its files are only read.
        output: the new file (`gguf`) or folder (`llama`).
        to: `gguf` for llama.cpp and what is built on it, beside it `NAME.Modelfile` for ollama; `llama` for a plain
            `LlamaForCausalLM`, which every engine loads.
        dtype: of the matrices in a GGUF file: `f32`, `f16`, `bf16`, `q8_0`, or `auto` for the checkpoint's own.
        tokenizer_from: GGUF file whose tokenizer is copied, that of the base model, instead of converting the checkpoint's.
        pad: with `llama`, fill up layers of different sizes with zero rows and columns, which changes no output.
        overwrite: replace `output`.

    Raises:
        UsageError: before anything is written, for a checkpoint, a tokenizer or RoPE scaling that the format cannot hold,
            layers of different sizes without `pad`, or an `output` that exists.
        WorkError: reading or writing failed; nothing is left of `output`.
    """
    if to not in FORMATS:
        raise unknown("format", to, FORMATS)
    if to == "gguf" and pad:
        raise UsageError("a GGUF file holds layers of different sizes: leave pad out")
    if to == "gguf" and Path(output).suffix != ".gguf":
        raise UsageError(f"{output} must end in .gguf, by which llama.cpp and ollama know the format")
    if to == "llama" and (dtype != "auto" or tokenizer_from is not None):
        raise UsageError("a plain Llama keeps dtype and tokenizer of its checkpoint: leave dtype and tokenizer_from out")
    target = refuse_existing(output, overwrite, file=to == "gguf")
    source = Source.open(model)
    copied = [] if tokenizer_from is None else [tokenizer_from]
    refuse_overwriting_inputs(target, [source.folder.path, *source.folder.path.iterdir(), *copied])
    if to == "llama":
        return write_plain_llama(source, target, pad=pad, overwrite=overwrite)
    return write_gguf(source, target, dtype=dtype, tokenizer_from=tokenizer_from, overwrite=overwrite)
