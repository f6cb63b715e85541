"""Train small Llamas that no method here was tuned on: `python benchmarks/train_models.py NAME -o FOLDER`.

Both learn the source code of this Python's standard library: files whose path's hash is divisible by twenty are for
testing, the others for training and calibration; a model's folder gets both as `train.txt` and `test.txt`, its
tokenizer, and nothing else is needed. `deep` is narrow and deep with two query heads to a KV head; `wide` is shallow
with six, and is trained for many more tokens per parameter, where pruning costs most.
"""

from __future__ import annotations

import argparse
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from train_demo import WINDOW, build_model, train, train_tokenizer

BATCH = 16


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
    """Return training and test text: the modules of the standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[list[str], list[str]] = ([], [])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not {"site-packages", "dist-packages", "test", "tests", "idlelib"} & set(name.parts):
            parts[zlib.crc32(str(name).encode()) % 20 == 0].append(path.read_text(encoding="utf-8", errors="ignore"))
    return "\n\n".join(parts[0]), "\n\n".join(parts[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(SHAPES))
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    shape = SHAPES[args.name]
    text, test = texts()
    tokenizer = train_tokenizer(text)
    model = build_model(
        tokenizer,
        hidden_size=shape.hidden,
        head_dim=shape.head_dim,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.ffn,
    )
    train(model, tokenizer, text, shape.tokens // (WINDOW * BATCH), BATCH, warmup=100)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    (args.output / "train.txt").write_text(text, encoding="utf-8")
    (args.output / "test.txt").write_text(test, encoding="utf-8")


if __name__ == "__main__":
    main()
