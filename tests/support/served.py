"""Checkpoints whose layers differ in every way that an export has to carry."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_gqaprune import PrunedLlamaConfig, PrunedLlamaForCausalLM
from hf_gqaprune.data import demo_model_path

#: query heads, KV heads and FFN width of a layer; 0 where the block is removed
Layer = tuple[int, int, int]

_EQUAL: list[Layer] = [(8, 4, 96)] * 3
_LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

ARCHITECTURES: dict[str, tuple[list[Layer], dict[str, Any]]] = {
    "equal layers": (_EQUAL, {}),
    "equal layers with biases": (
        _EQUAL, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False, "rope_parameters": _LLAMA_3},
    ),
    "unequal KV heads": ([(8, 4, 96), (4, 2, 96), (2, 1, 96)], {}),
    "n_rep 1, 8, 3, 2": ([(1, 1, 64), (8, 1, 64), (6, 2, 64), (6, 3, 64)], {}),
    "n_rep 4 to 7": ([(4, 1, 32), (5, 1, 32), (12, 2, 32), (7, 1, 64)], {"tie_word_embeddings": False}),
    "FFN of 32 k": ([(8, 4, 32), (8, 4, 128), (6, 3, 96)], {}),
    "odd FFN": ([(8, 4, 37), (8, 4, 1), (8, 2, 95)], {"tie_word_embeddings": False}),
    "Llama 3 RoPE": ([(8, 4, 64), (4, 4, 32)], {"rope_parameters": _LLAMA_3}),
    "linear RoPE": ([(8, 4, 64), (4, 4, 32)], {"rope_parameters": _LINEAR}),
    "YaRN": ([(8, 4, 64), (4, 4, 32)], {"rope_parameters": _YARN}),
    "biases": ([(8, 4, 64), (6, 2, 40)], {"attention_bias": True, "mlp_bias": True}),
    "biases and removed blocks": ([(8, 4, 0), (0, 0, 40), (4, 2, 32)], {"attention_bias": True, "mlp_bias": True}),
    "first attention removed": ([(0, 0, 64), (8, 4, 96), (4, 2, 64)], {}),
    "middle attention removed": ([(8, 4, 96), (0, 0, 64), (4, 2, 64)], {}),
    "last attention removed": ([(8, 4, 96), (4, 2, 64), (0, 0, 64)], {"tie_word_embeddings": False}),
    "first FFN removed": ([(8, 4, 0), (8, 4, 96), (4, 2, 64)], {}),
    "last FFN removed": ([(8, 4, 96), (4, 2, 64), (8, 4, 0)], {}),
    "whole layer removed": ([(8, 4, 96), (0, 0, 0), (4, 2, 64)], {}),
    "attention and FFN removed": ([(0, 0, 96), (4, 2, 0), (6, 2, 50)], {"rope_parameters": _LLAMA_3}),
}


def served_model(name: str, **values: Any) -> PreTrainedModel:
    """A random float32 model of `ARCHITECTURES` for the demo's tokenizer; biases and norms are random too."""
    layers, options = ARCHITECTURES[name]
    settings = {
        "vocab_size": 1024, "hidden_size": 48, "num_hidden_layers": len(layers), "head_dim": 16, "num_attention_heads": 8,
        "num_key_value_heads": 4, "intermediate_size": 96, "max_position_embeddings": 256, "initializer_range": 0.2,
        "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": True, **options, **values,
    }  # fmt: skip
    torch.manual_seed(len(name))
    if len(set(layers)) == 1:
        model = LlamaForCausalLM(LlamaConfig(**settings))
    else:
        sizes = {index: _sizes(*layer) for index, layer in enumerate(layers)}
        model = PrunedLlamaForCausalLM(PrunedLlamaConfig(**settings, per_layer_config=sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def served_checkpoint(name: str, folder: Path, **values: Any) -> PreTrainedModel:
    """Save `served_model` with the demo's tokenizer to `folder`, and return it."""
    model = served_model(name, **values)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo_model_path() / file, folder / file)
    return model


def _sizes(heads: int, kv_heads: int, ffn: int) -> dict[str, Any]:
    sizes: dict[str, Any] = {"num_attention_heads": heads, "num_key_value_heads": kv_heads} if kv_heads else {}
    sizes |= {"intermediate_size": ffn} if ffn else {}
    skip = [block for block, size in (("attention", kv_heads), ("mlp", ffn)) if not size]
    return sizes | ({"skip": skip} if skip else {})


_SAMPLES = (
    "the quick brown fox", "Zürich, naïve façade", "Привет, мир", "你好，世界", "こんにちは世界", "안녕하세요", "مرحبا بالعالم", "שלום",
    "नमस्ते दुनिया", "สวัสดีชาวโลก", "👋🏽🌍 👩‍👩‍👧‍👦🇨🇭", "don't I'LL we've she'd", "3.14159 1234567 ٣٤٥ ½ Ⅷ", "a += b[i] * (c - 1);",
    "def f(x):\n\treturn x", "https://example.org/?q=a%20b#c", "…—–‘’“”«»", "e\u0301 vs é ﬁ", "x² ∑∫√ ≤ ≥ €£¥", "\u00a0nbsp\u2003em\u200bzero",
    "<|im_end|> <s> </s>", "snake_case camelCase SCREAMING", "!!! ??? ... ---", "TAB\tTAB", "\r\nwindows\r\n", "\n\n\n", "   ", "\t \n ",
)  # fmt: skip


def unicode_lines(count: int, seed: int = 0) -> list[str]:
    """Lines of mixed scripts, code, digits, emoji and spaces, some of them random characters."""
    dice = random.Random(seed)
    lines = []
    for _ in range(count):
        parts = [dice.choice(_SAMPLES) for _ in range(dice.randint(1, 4))]
        if dice.random() < 0.3:
            blocks = [(0x20, 0x7E), (0xA1, 0x24F), (0x370, 0x3FF), (0x410, 0x44F), (0x4E00, 0x4FFF), (0x1F600, 0x1F64F)]
            low, high = dice.choice(blocks)
            parts.append("".join(chr(dice.randint(low, high)) for _ in range(dice.randint(1, 12))))
        dice.shuffle(parts)
        lines.append(dice.choice(["", " ", "  ", "\n", "."]).join(parts))
    return lines
