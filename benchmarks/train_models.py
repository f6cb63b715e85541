"""Train small Llamas that no method here was tuned on: `python benchmarks/train_models.py NAME -o FOLDER`.

Both learn the source code of this Python's standard library: files whose path's hash is divisible by twenty are for
testing, the others for training and calibration; a model's folder gets both as `train.txt` and `test.txt`, its
tokenizer, and nothing else is needed. `deep` is narrow and deep with two query heads to a KV head; `wide` is shallow
with six, and is trained for many more tokens per parameter, where pruning costs most.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from train_demo import train_tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

WINDOW, BATCH, WARMUP, PEAK, FLOOR = 128, 16, 100, 4e-3, 0.02


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and the tokens it is trained for."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    tokens: int


SHAPES = {
    "deep": Shape(hidden=128, layers=10, heads=8, kv_heads=4, head_dim=16, ffn=352, tokens=3_000_000),
    "wide": Shape(hidden=96, layers=4, heads=24, kv_heads=4, head_dim=8, ffn=288, tokens=10_000_000),
}


def texts() -> tuple[str, str]:
    """Training and test text: the modules of the standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[list[str], list[str]] = ([], [])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not {"site-packages", "dist-packages", "test", "tests", "idlelib"} & set(name.parts):
            parts[zlib.crc32(str(name).encode()) % 20 == 0].append(path.read_text(encoding="utf-8", errors="ignore"))
    return "\n\n".join(parts[0]), "\n\n".join(parts[1])


def build(shape: Shape, tokenizer) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=shape.hidden,
        head_dim=shape.head_dim,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.ffn,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig.from_model_config(config)
    return model


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to `FLOOR`."""
    return min((step + 1) / WARMUP, FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(SHAPES))
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    shape = SHAPES[args.name]
    train, test = texts()
    tokenizer = train_tokenizer(train)
    ids = torch.tensor(tokenizer(train, add_special_tokens=False, verbose=False)["input_ids"])
    windows = ids[: len(ids) // (WINDOW - 1) * (WINDOW - 1)].view(-1, WINDOW - 1)
    windows = torch.cat([torch.full((len(windows), 1), tokenizer.bos_token_id), windows], 1)
    model = build(shape, tokenizer)
    steps = shape.tokens // (WINDOW * BATCH)
    print(f"{model.num_parameters():,} parameters, text of {len(ids):,} tokens, {steps:,} steps", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    order = torch.randperm(len(windows))
    start = time.time()
    for step in range(steps):
        rows = torch.arange(step * BATCH, (step + 1) * BATCH) % len(windows)
        batch = windows[order[rows]]
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            print(f"step {step:6d}  loss {loss.item():.4f}  {time.time() - start:.0f} s", flush=True)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    (args.output / "train.txt").write_text(train, encoding="utf-8")
    (args.output / "test.txt").write_text(test, encoding="utf-8")


if __name__ == "__main__":
    main()
