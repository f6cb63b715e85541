"""Judge where a model of given sizes can be served, before it exists."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ..errors import UsageError
from ..models import LayerShape, ModelShape
from .plain_llama import common_shape

YES, PLUGIN, NO = "yes", "with plugin", "no"


@dataclass(frozen=True)
class Verdict:
    """Whether one engine serves a model.

    Attributes:
        answer: `yes`, `with plugin` or `no`.
        reason: how, or what is in the way.
        constraint: what the plan would have to keep for a yes, or for full speed and precision; empty where nothing is.
    """

    engine: str
    answer: str
    reason: str
    constraint: str = ""

    def __str__(self) -> str:
        return f"{self.engine}: {self.answer}, {self.reason}" + (f"; {self.constraint}" if self.constraint else "")


def verdicts(shape: ModelShape, tensor_parallel: int = 1) -> tuple[Verdict, ...]:
    """Say for each engine whether it serves a model of these sizes, how, and what would make it better.

    docs/serving.md says which of this was seen in the engines, and in which versions.

    Args:
        shape: sizes of every layer, such as `plan.target`.
        tensor_parallel: number of GPUs that every layer is split over.

    Raises:
        UsageError: `tensor_parallel` below 1.
    """
    if tensor_parallel < 1:
        raise UsageError(f"tensor_parallel={tensor_parallel} must be at least 1")
    return tuple(judge(shape, tensor_parallel) for judge in _ENGINES)


def tensor_parallel_sizes(shape: ModelShape, most: int = 8, *, shared_kv: bool = True) -> tuple[int, ...]:
    """Return the numbers of GPUs, up to `most`, that every layer can be split over evenly.

    With `shared_kv` several GPUs may hold the same KV head, as in vLLM.
    """
    return tuple(size for size in range(1, most + 1) if not _undivided(shape, size, shared_kv))


def layers_off_blocks(shape: ModelShape, block: int) -> list[int]:
    """List the layers in which the columns of o_proj or down_proj are no multiple of a quantization's block.

    llama.cpp's K-quants have blocks of 256 and fall back to larger types; Q8_0 and Q4_0 have 32 and fall back to F16.
    """
    return _layers_with(shape, lambda layer: bool(layer.ffn % block or layer.query_heads * layer.head_dim % block))


def _transformers(shape: ModelShape, tensor_parallel: int) -> Verdict:
    verdict = Verdict("transformers", YES, "by trust_remote_code, or with hf_gqaprune imported")
    return _split(shape, tensor_parallel, verdict, shared_kv=False)


def _vllm(shape: ModelShape, tensor_parallel: int) -> Verdict:
    verdict = Verdict("vLLM", YES, "by trust_remote_code in its Transformers backend")
    if skipped := _layers_with(shape, lambda layer: not layer.kv_heads):
        reason = f"attention is removed in {_named(skipped)}, for which its Transformers backend needs a plugin"
        verdict = Verdict("vLLM", PLUGIN, reason, "keep one KV group in every layer")
    return _split(shape, tensor_parallel, verdict)


def _llama_cpp(shape: ModelShape, _: int) -> Verdict:
    how = "as GGUF" if len(set(shape.layers)) == 1 else "as GGUF of architecture deci"
    if stubs := sum(len(layer.skip) for layer in shape.layers):
        how += f", {stubs} removed blocks as blocks of zeros"
    for block, fallback in ((32, "Q8_0 falls back to F16"), (256, "K-quants fall back to larger types")):
        if layers := layers_off_blocks(shape, block):
            constraint = f"{fallback} in {_named(layers)}: keep FFN and query widths at multiples of {block}"
            return Verdict("llama.cpp", YES, how, constraint)
    return Verdict("llama.cpp", YES, how)


def _ollama(shape: ModelShape, tensor_parallel: int) -> Verdict:
    below = _llama_cpp(shape, tensor_parallel)
    return Verdict("ollama", below.answer, below.reason + " with its Modelfile", below.constraint)


def _plain_llama(shape: ModelShape, tensor_parallel: int) -> Verdict:
    name = "engines for plain Llama"
    try:
        size = common_shape(shape)
    except UsageError as error:
        return Verdict(name, NO, str(error))
    if all(layer == size for layer in shape.layers):
        return _split(shape, tensor_parallel, Verdict(name, YES, "after gqaprune export --to llama"))
    padded = replace(shape, layers=(size,) * len(shape.layers))
    added = padded.cost.parameters - shape.cost.parameters
    return Verdict(
        name,
        NO,
        "layers differ, or their query heads do not divide hidden_size",
        f"--to llama --pad adds {added:,} zeros ({added / shape.cost.parameters:.1%}), or plan every layer alike",
    )


_ENGINES: tuple[Callable[[ModelShape, int], Verdict], ...] = (_transformers, _vllm, _llama_cpp, _ollama, _plain_llama)


def _split(shape: ModelShape, tensor_parallel: int, verdict: Verdict, shared_kv: bool = True) -> Verdict:
    """Judge where the layers can be split over GPUs."""
    layers = _undivided(shape, tensor_parallel, shared_kv)
    if not layers:
        return verdict
    fitting = ", ".join(map(str, tensor_parallel_sizes(shape, shared_kv=shared_kv)))
    reason = f"{tensor_parallel} GPUs do not divide the query heads, KV heads or FFN of {_named(layers)}"
    return Verdict(verdict.engine, NO, reason, f"{fitting} would, or keep multiples of {tensor_parallel} in every layer")


def _undivided(shape: ModelShape, size: int, shared_kv: bool) -> list[int]:
    """List the layers whose parts would be uneven."""

    def uneven(layer: LayerShape) -> bool:
        whole = layer.kv_heads % size == 0 or (shared_kv and size % layer.kv_heads == 0)
        return bool(layer.query_heads % size or layer.ffn % size or not whole)

    return _layers_with(shape, uneven)


def _layers_with(shape: ModelShape, trait: Callable[[LayerShape], bool]) -> list[int]:
    return [index for index, layer in enumerate(shape.layers) if trait(layer)]


def _named(layers: Iterable[int]) -> str:
    first, *rest = layers
    return f"layer {first}" + (f" and {len(rest)} more" if rest else "")
