"""Create random-weight checkpoints of real shapes, and read the memory use of a process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hf_gqaprune.checkpoint.reader import INDEX
from hf_gqaprune.checkpoint.writer import ShardWriter
from hf_gqaprune.utils.device import select_device
from hf_gqaprune.utils.files import write_json

_BLOCK = 1 << 26
_LLAMA_3 = {
    "vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "bos_token_id": 128000, "eos_token_id": 128001, "dtype": "bfloat16",
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _LLAMA_3
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "llama-3-8b": _LLAMA_3
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "tie_word_embeddings": False},
    "llama-3-70b": _LLAMA_3
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    | {"tie_word_embeddings": False},
    # small enough to be measured at many depths and lengths
    "small": _LLAMA_3
    | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "tie_word_embeddings": False}
    | {"vocab_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 4, "bos_token_id": 0, "eos_token_id": 1},
    # whose greedy removal costs little beside the tokens
    "narrow": _LLAMA_3
    | {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "tie_word_embeddings": False}
    | {"vocab_size": 8192, "num_attention_heads": 8, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1},
    # for the tests of the benchmarks
    "tiny": _LLAMA_3
    | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "tie_word_embeddings": False}
    | {"vocab_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "bos_token_id": 0, "eos_token_id": 1},
}


def make_checkpoint(shape: str, folder: Path, max_shard_size: str = "5GB", layers: int | None = None) -> None:
    """Write a Llama of the sizes `SHAPES[shape]`, or of fewer layers, with normal random bfloat16 weights.

    One 64 MiB block is in memory at a time. A GPU, where there is one, draws others than the CPU.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers}))
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.tie_weights()
    tensors = {name: t for name, t in model.state_dict().items() if name not in model.all_tied_weights_keys}
    folder.mkdir(parents=True)
    generator = torch.Generator(select_device(None)).manual_seed(0)
    with ShardWriter(folder, tensors, max_shard_size, model.num_parameters()) as writer:
        for name, tensor in tensors.items():
            writer.write(name, _random(tensor.numel(), generator))
        writer.sync()
        if writer.index is not None:
            write_json(folder / INDEX, writer.index)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)


def random_windows(vocabulary: int, tokens: int, seq_len: int) -> torch.Tensor:
    """Token ids, int64 `(tokens // seq_len, seq_len)`, at least one row."""
    size = (max(1, tokens // seq_len), seq_len)
    return torch.randint(vocabulary, size, generator=torch.Generator().manual_seed(0))


def forget(folder: Path) -> None:
    """Drop the weights in `folder` from the page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def proc(name: str) -> dict[str, int]:
    """The numbers in `/proc/self/NAME`."""
    rows = (line.split(":") for line in Path(f"/proc/self/{name}").read_text().splitlines())
    return {key: int(value.split()[0]) for key, value in rows if value.split() and value.split()[0].isdigit()}


def peak_rss() -> int:
    """The most bytes that this process has had in memory since `forget_peak`, touched pages of mapped files included."""
    return proc("status")["VmHWM"] * 1024


def forget_peak() -> None:
    """Begin a new measurement of `peak_rss`."""
    Path("/proc/self/clear_refs").write_text("5")


def _random(elements: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    step = _BLOCK // 2
    for first in range(0, elements, step):
        piece = torch.empty(min(step, elements - first), dtype=torch.bfloat16, device=generator.device)
        yield piece.normal_(0, 0.02, generator=generator).cpu()
