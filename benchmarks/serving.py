"""Compare checkpoints in llama.cpp, in every dtype, with transformers: perplexity, file size and decoding speed.

    python benchmarks/serving.py DENSE PRUNED... --text FILE [--windows 8] [--seq-len 512] [--rounds 3] [--threads 2]

Needs the environment of `make test-serving`. Perplexity is over the same windows everywhere: BOS and seq_len - 1 tokens.
Speeds are the best of some rounds in which all files take turns; none are measured in 0 rounds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import llama_cpp
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_gqaprune as gp

DTYPES = ("f32", "f16", "q8_0")


def windows(folder: Path, text: str, count: int, seq_len: int) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(text[: 8 * count * seq_len], add_special_tokens=False)
    step = seq_len - 1
    return [[tokenizer.bos_token_id, *ids[first * step : (first + 1) * step]] for first in range(count)]


def nats(logits: np.ndarray, ids: list[int]) -> float:
    scores = torch.from_numpy(logits[: len(ids) - 1]).float()
    return float(torch.nn.functional.cross_entropy(scores, torch.tensor(ids[1:]), reduction="sum"))


def perplexity_in_transformers(folder: Path, texts: list[list[int]]) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        total = sum(nats(model(torch.tensor([ids])).logits[0].numpy(), ids) for ids in texts)
    return float(np.exp(total / sum(len(ids) - 1 for ids in texts)))


def perplexity_in_llama_cpp(file: Path, texts: list[list[int]], threads: int) -> float:
    length = len(texts[0])
    served = llama_cpp.Llama(str(file), n_ctx=length, n_batch=length, logits_all=True, n_threads=threads, verbose=False)
    total = 0.0
    for ids in texts:
        served.reset()
        served.eval(ids)
        total += nats(served.scores[: len(ids)], ids)
    return float(np.exp(total / sum(len(ids) - 1 for ids in texts)))


def decoding_speed(file: Path, prompt: list[int], threads: int, tokens: int = 64) -> float:
    """Tokens per second after the prompt."""
    served = llama_cpp.Llama(str(file), n_ctx=256, n_threads=threads, verbose=False)
    served.eval(prompt)
    begun = time.perf_counter()
    for index in range(tokens):
        served.eval([prompt[index % len(prompt)]])
    return tokens / (time.perf_counter() - begun)


def quantized(file: Path) -> Path:
    small = file.with_name(f"{file.stem.rpartition('-')[0]}-q4_k_m.gguf")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    if llama_cpp.llama_model_quantize(str(file).encode(), str(small).encode(), params):
        raise RuntimeError(f"llama.cpp could not quantize {file}")
    return small


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    texts = windows(args.models[0], args.text.read_text(encoding="utf-8"), args.windows, args.seq_len)
    print(f"{args.windows} windows of {args.seq_len} tokens of {args.text.name}; transformers in float32")
    print("| model | file | MB | perplexity | to transformers | tokens/s |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        files: dict[tuple[str, str], Path] = {}
        for folder in args.models:
            for dtype in DTYPES:
                path = Path(scratch) / f"{folder.name}-{dtype}.gguf"
                files[folder.name, dtype] = gp.export(folder, path, dtype=dtype).path
            files[folder.name, "q4_k_m"] = quantized(files[folder.name, "f16"])
        rounds = [
            {key: decoding_speed(file, texts[0][:64], args.threads) for key, file in files.items()} for _ in range(args.rounds)
        ]
        for folder in args.models:
            reference = perplexity_in_transformers(folder, texts)
            print(f"| {folder.name} | transformers | | {reference:.3f} | | |", flush=True)
            for dtype in (*DTYPES, "q4_k_m"):
                key, found = (folder.name, dtype), perplexity_in_llama_cpp(files[folder.name, dtype], texts, args.threads)
                speed = f"{max(speeds[key] for speeds in rounds):.1f}" if rounds else ""
                size = f"{files[key].stat().st_size / 1e6:.0f}"
                row = (folder.name, dtype, size, f"{found:.3f}", f"{found / reference:.4f}", speed)
                print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
