"""llama.cpp computes of an exported file what transformers computes of the checkpoint: `make test-serving`."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import torch
from support.served import ARCHITECTURES, served_checkpoint, unicode_lines
from support.tokenizers_served import TOKENIZERS, save_tokenizer
from transformers import AutoTokenizer

import hf_gqaprune as gp
from hf_gqaprune.data.demo import demo_model_path, demo_text


def engine(path: Path, **options: Any) -> llama_cpp.Llama:
    """llama.cpp with a float32 cache and logits of every position."""
    float32 = {"type_k": 0, "type_v": 0, "n_ctx": 128, "n_batch": 128, "logits_all": True}
    return llama_cpp.Llama(str(path), n_threads=2, verbose=False, **(float32 | options))


def decoded(served: llama_cpp.Llama, ids: list[int]) -> str:
    """Text of `ids`; the binding's own method cuts tokens of more than 32 bytes off."""
    vocabulary, buffer = llama_cpp.llama_model_get_vocab(served.model), ctypes.create_string_buffer(4096)
    pieces = []
    for index in ids:
        size = llama_cpp.llama_token_to_piece(vocabulary, index, buffer, len(buffer), 0, True)
        pieces.append(buffer.raw[:size])
    return b"".join(pieces).decode(errors="replace")


def logits(served: llama_cpp.Llama, ids: list[int]) -> np.ndarray:
    served.reset()
    served.eval(ids)
    return served.scores[: len(ids)].copy()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_and_greedy_tokens_are_those_of_transformers(name, tmp_path):
    model = served_checkpoint(name, tmp_path / "model")
    served = engine(gp.export(tmp_path / "model", tmp_path / "model.gguf").path)
    ids = torch.randint(2, 1024, (1, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits[0].numpy()
    assert np.abs(logits(served, ids[0].tolist()) - expected).max() < 1e-4
    greedy = model.generate(ids[:, :8], do_sample=False, min_new_tokens=64, max_new_tokens=64, pad_token_id=1)[0, 8:].tolist()
    served.reset()
    served.eval(ids[0, :8].tolist())
    found = []
    for _ in range(64):
        scores = served.scores[served.n_tokens - 1]
        # as min_new_tokens does
        found.append(int(np.where(np.arange(1024) == 1, -np.inf, scores).argmax()))
        served.eval(found[-1:])
    assert found == greedy


@pytest.mark.parametrize("dtype, bound", [("f16", 0.01), ("bf16", 0.05), ("q8_0", 0.1)])
def test_smaller_dtypes_stay_near(dtype, bound, tmp_path):
    model = served_checkpoint("FFN of 32 k", tmp_path / "model", hidden_size=64)
    served = engine(gp.export(tmp_path / "model", tmp_path / "model.gguf", dtype=dtype).path)
    ids = torch.randint(2, 1024, (1, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits[0].numpy()
    assert (logits(served, ids[0].tolist()) - expected).std() < bound * expected.std()


def test_the_quantizer_of_llama_cpp_reads_the_file(tmp_path):
    served_checkpoint("unequal KV heads", tmp_path / "model", hidden_size=256)
    path = gp.export(tmp_path / "model", tmp_path / "model.gguf").path
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    small = tmp_path / "small.gguf"
    assert llama_cpp.llama_model_quantize(str(path).encode(), str(small).encode(), params) == 0
    assert small.stat().st_size < path.stat().st_size / 2
    assert np.isfinite(logits(engine(small), [5, 6, 7])).all()


def test_a_padded_llama_is_served_as_the_checkpoint_is(tmp_path):
    model = served_checkpoint("attention and FFN removed", tmp_path / "model")
    gp.export(tmp_path / "model", tmp_path / "padded", to="llama", pad=True)
    served = engine(gp.export(tmp_path / "padded", tmp_path / "padded.gguf").path)
    ids = torch.randint(2, 1024, (1, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits[0].numpy()
    assert np.abs(logits(served, ids[0].tolist()) - expected).max() < 1e-4


def test_perplexity_of_the_demo_is_that_of_transformers(tmp_path):
    (tmp_path / "text.txt").write_text(demo_text("test", 3000))
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "serving.py"
    options = ["--text", tmp_path / "text.txt", "--windows", "2", "--seq-len", "128"]
    done = subprocess.run([sys.executable, script, demo_model_path(), *options], capture_output=True, text=True, check=True)
    rows = [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines() if line.startswith("| demo_model")]
    ratios = {row[2]: float(row[5]) for row in rows if row[5]}
    assert ratios["f32"] == 1 and ratios["f16"] == pytest.approx(1, abs=1e-3)
    assert ratios["q8_0"] == pytest.approx(1, abs=0.01) and ratios["q4_k_m"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_becomes_the_same_tokens_and_back(name, tmp_path):
    save_tokenizer(name, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    served_checkpoint("equal layers", tmp_path / "weights", vocab_size=len(tokenizer) + 3)
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "weights" / file).rename(tmp_path / "model" / file)
    served = engine(gp.export(tmp_path / "model", tmp_path / "model.gguf").path, vocab_only=True)
    wrong = []
    for line in unicode_lines(2000):
        if name == "llama-2 of transformers 5" and (line.startswith(" ") or "s>" in line):
            continue  # no space goes before such a line, or after <s>, which SentencePiece and llama.cpp put there
        ids = tokenizer.encode(line, add_special_tokens=False)
        pieces = served.tokenize(line.encode(), add_bos=False, special=True)
        framed = served.tokenize(line.encode(), add_bos=True, special=True)
        same = ids == pieces and tokenizer.encode(line) == framed
        text = decoded(served, ids)
        # a client of llama.cpp removes the space that a SentencePiece vocabulary puts before a text
        expected = " " * name.startswith("llama-2") + tokenizer.decode(ids)
        if not same or text != expected:
            wrong.append((line, ids, pieces))
    assert wrong == [], json.dumps(wrong[:3], ensure_ascii=False)
