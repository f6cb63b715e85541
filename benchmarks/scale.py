"""How close streamed pruning comes to what the disk can do, on a random-weight checkpoint of a real shape.

    python benchmarks/scale.py llama-3.2-1b -o RESULTS.json [--folder DISK] [--repeat 3]

The checkpoint is made on the spot, shard by shard, and deleted at the end. Each round measures, with cold caches, the
floor (a sequential read of the checkpoint, then a sequential write of as many bytes as the pruned one has, synced) and
`prune_checkpoint` of a random plan that removes a fifth of the backbone, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import hf_gqaprune as gp
from hf_gqaprune.files import write_json
from hf_gqaprune.report import versions
from hf_gqaprune.shards import INDEX, ShardWriter

BACKBONE_RATIO = 0.2
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
}


def make_checkpoint(shape: str, folder: Path, max_shard_size: str = "5GB") -> None:
    """Write a Llama of the sizes `SHAPES[shape]` with normal random bfloat16 weights, one 64 MiB block in memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[shape])
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.tie_weights()
    tensors = {name: t for name, t in model.state_dict().items() if name not in model.all_tied_weights_keys}
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(folder, tensors, max_shard_size, model.num_parameters()) as writer:
        for name, tensor in tensors.items():
            writer.write(name, _random(tensor.numel(), generator))
        writer.sync()
        if writer.index is not None:
            write_json(folder / INDEX, writer.index)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)


def _random(elements: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    step = _BLOCK // 2
    for first in range(0, elements, step):
        yield torch.empty(min(step, elements - first), dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def forget(folder: Path) -> None:
    """Drop the files of `folder` from the page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def floor(checkpoint: Path, size: int, scratch: Path) -> dict[str, float]:
    """Seconds of a sequential read of the weights in `checkpoint` and of a synced sequential write of `size` bytes."""
    forget(checkpoint)
    block = bytearray(_BLOCK)
    start = time.perf_counter()
    for path in sorted(checkpoint.glob("*.safetensors")):
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(block):
                pass
    middle = time.perf_counter()
    with scratch.open("wb", buffering=0) as stream:
        left = memoryview(block)
        while size:
            size -= stream.write(left[:size])
        os.fsync(stream.fileno())
    end = time.perf_counter()
    scratch.unlink()
    return {"read": middle - start, "write": end - middle}


def measure(checkpoint: Path, plan: Path, output: Path) -> dict[str, float]:
    """`prune_checkpoint` in a process of its own: seconds, bytes and peak memory; `output` is removed."""
    forget(checkpoint)
    command = [sys.executable, __file__, "--child", str(checkpoint), str(plan), str(output)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    shutil.rmtree(output)
    return json.loads(done.stdout.splitlines()[-1])


def child(checkpoint: str, plan: str, output: str) -> None:
    """What `measure` starts."""
    prune, loaded = gp.prune_checkpoint, gp.PruningPlan.load(plan)
    before, resident, start = _proc("io"), _proc("status")["VmRSS"], time.perf_counter()
    prune(checkpoint, loaded, output, compensation="none")
    seconds, after = time.perf_counter() - start, _proc("io")
    print(
        json.dumps(
            {
                "seconds": seconds,
                "peak_rss": _proc("status")["VmHWM"] * 1024,
                "rss_before": resident * 1024,
                "bytes_read": after["rchar"] - before["rchar"],
                "bytes_written": after["wchar"] - before["wchar"],
                "bytes_from_disk": after["read_bytes"] - before["read_bytes"],
            }
        )
    )


def _proc(name: str) -> dict[str, int]:
    """The numbers in `/proc/self/NAME`."""
    rows = (line.split(":") for line in Path(f"/proc/self/{name}").read_text().splitlines())
    return {key: int(value.split()[0]) for key, value in rows if value.split() and value.split()[0].isdigit()}


def main() -> None:
    """Make the checkpoint, measure, print, write JSON, delete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are written: the disk that is measured")
    parser.add_argument("--repeat", type=int, default=3, help="rounds; medians are printed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        make_checkpoint(args.shape, folder / "dense")
        plan = gp.make_plan(model=folder / "dense", backbone_ratio=BACKBONE_RATIO, criterion="random")
        plan.save(folder / "plan.json")
        size = 2 * plan.after.parameters
        rounds = []
        for _ in range(args.repeat):
            limits = floor(folder / "dense", size, folder / "scratch")
            found = measure(folder / "dense", folder / "plan.json", folder / "pruned")
            rounds.append({"floor": limits, "prune": found, "ratio": sum(limits.values()) / found["seconds"]})
            print(
                f"floor {limits['read']:.2f} s read + {limits['write']:.2f} s write, pruned in {found['seconds']:.2f} s: "
                f"{rounds[-1]['ratio']:.2f} of the disk's rate, peak RSS {found['peak_rss'] / 2**20:.0f} MiB",
                flush=True,
            )
    middle = statistics.median(r["ratio"] for r in rounds)
    print(f"{args.shape}: {middle:.2f} of the disk's rate (median of {args.repeat})")
    summary = {"shape": args.shape, "input_bytes": 2 * plan.before.parameters, "output_bytes": size, "ratio": middle}
    write_json(args.output, {**summary, "rounds": rounds, "versions": versions()})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
