"""Measure the cost of pruning a random-weight checkpoint of a real shape, which is created first and deleted at the end.

    python benchmarks/scale.py llama-3.2-1b -o RESULTS.json [--folder DISK] [--repeat 3]
    python benchmarks/scale.py llama-3-8b --measure streamed --layers 2 --tokens 2048 -o RESULTS.json
    python benchmarks/scale.py llama-3-8b --measure streamed --tokens 262144 --device cuda --memory 37GiB -o RESULTS.json
    python benchmarks/scale.py llama-3.2-1b --measure killed --layers 4 --tokens 2048 -o RESULTS.json
    python benchmarks/scale.py llama-3.2-1b --measure in-memory --tokens 32768 -o RESULTS.json

replay (default): each round measures, with cold caches, the floor (a sequential read of the checkpoint, then a sequential
write of as many bytes as the pruned one has, synced; through the cache, and with pages let go of at once) and
`prune_checkpoint` of a random plan.
streamed: statistics, plan and least-squares pruning, layer by layer: seconds, peak RSS and bytes of each stage.
killed: the same, and again killed twice, while measuring and while re-fitting, and gone on with: the files of both.
in-memory: statistics of the loaded model against bare forward and backward passes and bare moment products.

A fifth of the backbone goes. What is measured runs in a process of its own.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import stages
from shapes import SHAPES, forget, make_checkpoint, peak_rss, proc

import hf_gqaprune as gp
from hf_gqaprune.checkpoint.reader import drop_page_cache
from hf_gqaprune.checkpoint.writer import _BEHIND, _STRETCH
from hf_gqaprune.evaluation.report import versions
from hf_gqaprune.utils.device import select_device
from hf_gqaprune.utils.files import write_json

BACKBONE_RATIO = 0.2
_BLOCK = 1 << 22
_FLOORS = ("cached", "let go")
#: where stages work before they are done
_UNFINISHED = {"statistics": ".statistics.unfinished", "prune": ".pruned.unfinished"}


def floor(checkpoint: Path, size: int, scratch: Path, caching: bool) -> dict[str, float]:
    """Seconds of a sequential read of the weights in `checkpoint` and of a synced sequential write of `size` bytes.

    With `caching` as any program does it; without, pages of the cache are let go of at once, as pruning does it: that is the
    disk alone, and not also how fast new memory is found.
    """
    drop = (lambda *_: None) if caching else drop_page_cache
    forget(checkpoint)
    # small enough for the processor's caches
    block = bytearray(_BLOCK)
    left, sent = memoryview(block), deque([0])
    start = time.perf_counter()
    for path in sorted(checkpoint.glob("*.safetensors")):
        with path.open("rb", buffering=0) as stream:
            while count := stream.readinto(block):
                drop(stream.fileno(), stream.tell() - count, count)
    middle = time.perf_counter()
    with scratch.open("wb", buffering=0) as stream:
        while size:
            size -= stream.write(left[:size])
            if stream.tell() - sent[-1] >= _STRETCH:
                drop(stream.fileno(), sent[-1], _STRETCH)
                sent.append(stream.tell())
                if len(sent) > _BEHIND:
                    drop(stream.fileno(), sent.popleft(), _STRETCH)
        os.fsync(stream.fileno())
    end = time.perf_counter()
    scratch.unlink()
    return {"read": middle - start, "write": end - middle}


def in_a_process(what: str, *arguments: object) -> dict[str, Any]:
    """`CHILDREN[what]` of the arguments, as texts, in a process of its own."""
    done = subprocess.run(_child(what, *arguments), check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _child(what: str, *arguments: object) -> list[str]:
    return [sys.executable, __file__, "--child", what, *map(str, arguments)]


def killed(folder: Path, *work: object) -> dict[str, Any]:
    """`streamed` in one go, and killed at a half of the statistics and of the re-fit: seconds, and which files differ."""
    once, again = folder / "once", folder / "again"
    for scratch in (once, again):
        scratch.mkdir()
    whole = in_a_process("streamed", folder / "dense", once, *work)
    seconds = 0.0
    for stage in ("statistics", "prune"):
        process = subprocess.Popen(_child("streamed", folder / "dense", again, *work), stdout=subprocess.DEVNULL)
        begun = time.perf_counter()
        while process.poll() is None and not (again / _UNFINISHED[stage]).exists():
            time.sleep(0.01)
        try:
            process.wait(whole["stages"][stage]["seconds"] / 2)
        except subprocess.TimeoutExpired:
            process.kill()
        if process.wait() != -signal.SIGKILL:
            raise RuntimeError(f"it ended by itself before it was killed: {stage} took less than half as long")
        seconds += time.perf_counter() - begun
    last = in_a_process("streamed", folder / "dense", again, *work)
    names = sorted(str(path.relative_to(once)) for path in once.rglob("*") if path.is_file())
    _, differing, missing = filecmp.cmpfiles(once, again, names, shallow=False)
    return {
        "tokens": whole["tokens"],
        "layers": whole["layers"],
        "seconds": {"in one go": whole["seconds"], "killed twice": seconds + last["seconds"]},
        "files": len(names),
        "different": differing + missing,
    }


def replayed(checkpoint: str, plan: str, output: str) -> dict[str, Any]:
    """`prune_checkpoint` of a saved plan: seconds, bytes and peak memory; `output` is removed."""
    forget(Path(checkpoint))
    prune, loaded = gp.prune_checkpoint, gp.PruningPlan.load(plan)
    before, resident, start = proc("io"), proc("status")["VmRSS"], time.perf_counter()
    prune(checkpoint, loaded, output, compensation="none")
    seconds, after = time.perf_counter() - start, proc("io")
    shutil.rmtree(output)
    return {
        "seconds": seconds,
        "peak_rss": peak_rss(),
        "rss_before": resident * 1024,
        "bytes_read": after["rchar"] - before["rchar"],
        "bytes_written": after["wchar"] - before["wchar"],
        "bytes_from_disk": after["read_bytes"] - before["read_bytes"],
    }


CHILDREN = {
    "replay": replayed,
    "streamed": lambda checkpoint, scratch, tokens, seq_len, device, memory: stages.streamed(
        Path(checkpoint), Path(scratch), int(tokens), int(seq_len), BACKBONE_RATIO, select_device(device), memory
    ),
    "in-memory": lambda checkpoint, scratch, tokens, seq_len, device, memory: stages.in_memory(
        Path(checkpoint), int(tokens), int(seq_len), BACKBONE_RATIO
    ),
}


def replay(folder: Path, repeat: int) -> dict[str, Any]:
    """Rounds of floor and replay of a random plan; printed, and the median of their ratios."""
    plan = gp.make_plan(model=folder / "dense", backbone_ratio=BACKBONE_RATIO, criterion="random")
    plan.save(folder / "plan.json")
    size = 2 * plan.after.parameters
    rounds = []
    for _ in range(repeat):
        limits = {name: floor(folder / "dense", size, folder / "scratch", name == "cached") for name in _FLOORS}
        found = in_a_process("replay", folder / "dense", folder / "plan.json", folder / "pruned")
        ratios = {name: sum(limit.values()) / found["seconds"] for name, limit in limits.items()}
        rounds.append({"floor": limits, "prune": found, "ratio": ratios})
        for name, limit in limits.items():
            print(f"{name}: {limit['read']:.2f} s read + {limit['write']:.2f} s write", end="; ")
        print(f"pruned in {found['seconds']:.2f} s, peak RSS {found['peak_rss'] / 2**20:.0f} MiB", flush=True)
    middle = {name: statistics.median(r["ratio"][name] for r in rounds) for name in _FLOORS}
    for name, ratio in middle.items():
        print(f"{ratio:.2f} of the rate of files {name} (median of {repeat})")
    return {"input_bytes": 2 * plan.before.parameters, "output_bytes": size, "ratio": middle, "rounds": rounds}


def show(found: dict[str, Any]) -> None:
    """Print what `stages` measured."""
    peak = f", peak RSS {found['peak_rss'] / 2**30:.2f} GiB" if "peak_rss" in found else ""
    print(f"{found['layers']} layers, {found['tokens']:,} tokens{peak}")
    if "different" in found:
        seconds, files = found["seconds"], f"{len(found['different'])} of {found['files']} files differ"
        print(f"  in one go {seconds['in one go']:.1f} s, killed twice {seconds['killed twice']:.1f} s: {files}")
        return
    if "ratio" in found:
        for name, seconds in found["seconds"].items():
            print(f"  {name:14} {seconds:9.1f} s")
        print(f"  statistics {found['ratio']:.2f} of the bare work; selection and compensation {found['share']:.0%} of all")
        return
    print(f"  estimated      {found['estimated'] / 2**30:9.2f} GiB")
    for name, stage in found["stages"].items():
        moved = f"{stage['bytes_read'] / 1e9:.2f} GB read, {stage['bytes_written'] / 1e9:.2f} GB written"
        gpu = f"GPU {stage['gpu_taken'] / 2**30:.2f} ({stage['gpu_kept'] / 2**30:.2f}) GiB, " if "gpu_taken" in stage else ""
        print(f"  {name:14} {stage['seconds']:9.1f} s, {gpu}peak RSS {stage['peak_rss'] / 2**30:.2f} GiB, {moved}")
    print(f"  the process    {found['process_seconds']:9.1f} s")


def main() -> None:
    """Make the checkpoint, measure, print, write JSON, delete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--measure", choices=[*CHILDREN, "killed"], default="replay")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are written: the disk that is measured")
    parser.add_argument("--layers", type=int, help="so many layers instead of the shape's")
    parser.add_argument("--tokens", type=int, default=2048, help="of calibration, at least one window")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens per window")
    parser.add_argument("--repeat", type=int, default=3, help="rounds of replay; medians are printed")
    parser.add_argument("--device", default="cpu", help="of streamed and killed")
    parser.add_argument("--memory", default="80GiB", help="of a GPU that may be taken")
    args = parser.parse_args()
    work = (args.tokens, args.seq_len, args.device, args.memory)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        make_checkpoint(args.shape, folder / "dense", layers=args.layers)
        if args.measure == "replay":
            found = replay(folder, args.repeat)
        else:
            if args.measure == "killed":
                found = killed(folder, *work)
            else:
                (folder / "scratch").mkdir()
                start = time.perf_counter()
                found = in_a_process(args.measure, folder / "dense", folder / "scratch", *work)
                found["process_seconds"] = time.perf_counter() - start
            show(found)
    write_json(args.output, {"shape": args.shape, "measure": args.measure, **found, "versions": versions()})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(CHILDREN[sys.argv[2]](*sys.argv[3:])))
    else:
        main()
