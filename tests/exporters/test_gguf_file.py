"""A GGUF file read back by its own library holds the checkpoint: sizes, weights, RoPE, stubs."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from safetensors.torch import load_file, save_file
from support.served import ARCHITECTURES, served_checkpoint
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import hf_gqaprune as gp
from hf_gqaprune.checkpoint import resolve_model
from hf_gqaprune.exporters.gguf_tensors import _INNER

HEAD = 16


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys and tensors of a file."""
    reader = GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, {t.name: t for t in reader.tensors}


def values(tensor: Any) -> np.ndarray:
    return dequantize(tensor.data, tensor.tensor_type)


def halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head in the order of transformers, from that of llama.cpp."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_file_holds_every_weight_and_stubs_for_removed_blocks(name, tmp_path):
    layers, options = ARCHITECTURES[name]
    state = served_checkpoint(name, tmp_path / "model").state_dict()
    exported = gp.export(tmp_path / "model", tmp_path / "out" / "model.gguf")
    keys, tensors = read(exported.path)
    arch = keys["general.architecture"]
    assert arch == ("llama" if len(set(layers)) == 1 else "deci")
    stored = [(q or 1, kv or 1, ffn or 32) for q, kv, ffn in layers]
    for key, sizes in zip(("attention.head_count", "attention.head_count_kv", "feed_forward_length"), zip(*stored, strict=True), strict=True):
        assert keys[f"{arch}.{key}"] == (sizes[0] if len(set(sizes)) == 1 else list(sizes))
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        assert keys[f"{arch}.{key}"] == HEAD
    assert keys[f"{arch}.rope.freq_base"] == options.get("rope_parameters", {}).get("rope_theta", 10000.0)
    assert len(keys["tokenizer.ggml.tokens"]) == 1024

    written = {"token_embd.weight": state["model.embed_tokens.weight"], "output_norm.weight": state["model.norm.weight"]}
    if not options.get("tie_word_embeddings", True):
        written["output.weight"] = state["lm_head.weight"]
    added = 0
    for index, (heads, kv_heads, ffn) in enumerate(layers):
        prefix = f"model.layers.{index}."
        for key, weight in state.items():
            if key.startswith(prefix):
                module, _, kind = key.removeprefix(prefix).rpartition(".")
                written[f"blk.{index}.{_INNER[module]}.{kind}"] = weight
        for part, count in (("q", heads), ("k", kv_heads)):
            for kind in ("weight", "bias"):
                place = f"blk.{index}.attn_{part}.{kind}"
                if place in written:
                    assert np.array_equal(halves(values(tensors[place]), count), written.pop(place).numpy())
                    tensors.pop(place)
        for block, size, parts in (("attn", kv_heads, "q k v output norm"), ("ffn", ffn, "gate up down norm")):
            for part in parts.split() if not size else ():
                stub = values(tensors.pop(f"blk.{index}.{block}_{part}.weight"))
                assert (stub == (part == "norm")).all()
                added += stub.size
    rope = tensors.pop("rope_freqs.weight", None)
    assert (rope is not None) == ("rope_parameters" in options)
    assert tensors.keys() == written.keys()
    for place, weight in written.items():
        assert tensors[place].tensor_type == GGMLQuantizationType.F32
        assert np.array_equal(values(tensors[place]), weight.numpy()), place
    assert exported.added_parameters == added


@pytest.mark.parametrize("name", ["Llama 3 RoPE", "linear RoPE", "YaRN"])
def test_rope_is_that_of_transformers(name, tmp_path):
    served_checkpoint(name, tmp_path / "model")
    keys, tensors = read(gp.export(tmp_path / "model", tmp_path / "model.gguf").path)
    parameters = ARCHITECTURES[name][1]["rope_parameters"]
    rotary = LlamaRotaryEmbedding(LlamaConfig(head_dim=HEAD, max_position_embeddings=256, rope_parameters=parameters))
    plain = parameters["rope_theta"] ** -(np.arange(0, HEAD, 2) / HEAD)
    assert plain / values(tensors["rope_freqs.weight"]) == pytest.approx(rotary.inv_freq.numpy(), rel=1e-6)
    assert keys["deci.rope.scaling.attn_factor"] == pytest.approx(rotary.attention_scaling)
    assert (keys["deci.rope.scaling.attn_factor"] == 1) == (name != "YaRN")


def test_each_dtype_holds_what_it_can(tmp_path):
    model = served_checkpoint("FFN of 32 k", tmp_path / "model", hidden_size=64)
    embeddings = model.model.embed_tokens.weight.detach().numpy()
    for dtype, error in (("f32", 0), ("f16", 1e-3), ("bf16", 4e-3), ("q8_0", 1e-2)):
        keys, tensors = read(gp.export(tmp_path / "model", tmp_path / f"{dtype}.gguf", dtype=dtype).path)
        assert tensors["token_embd.weight"].tensor_type.name.lower() == dtype
        assert tensors["output_norm.weight"].tensor_type.name == "F32"
        assert np.abs(values(tensors["token_embd.weight"]) - embeddings).max() <= error * np.abs(embeddings).max()
        assert keys["general.file_type"] == {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}[dtype]


def test_auto_keeps_the_dtype_of_the_checkpoint_bit_for_bit(tmp_path):
    path = gp.export("demo", tmp_path / "demo.gguf").path
    _, tensors = read(path)
    weights = load_file(resolve_model("demo").path / "model.safetensors")
    assert tensors["token_embd.weight"].tensor_type.name == "BF16"
    assert np.array_equal(values(tensors["token_embd.weight"]), weights["model.embed_tokens.weight"].float().numpy())
    assert (tmp_path / "demo.Modelfile").read_text() == (
        'FROM ./demo.gguf\nPARAMETER num_ctx 512\nPARAMETER stop "<|end_of_text|>"\nTEMPLATE """{{ .Prompt }}"""\n'
    )


def test_rows_that_q8_0_does_not_divide_are_f16_and_said_so(tmp_path):
    served_checkpoint("odd FFN", tmp_path / "model", hidden_size=64)
    exported = gp.export(tmp_path / "model", tmp_path / "model.gguf", dtype="q8_0")
    _, tensors = read(exported.path)
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == "F16"
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == "Q8_0"
    assert any("3 matrices are f16, because q8_0 needs rows of a multiple of 32 (blk.0.ffn_down" in n for n in exported.notes)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": "q4_k_m"}, "unknown dtype 'q4_k_m'; allowed: auto, f32, f16, bf16, q8_0"),
        ({"to": "onnx"}, "unknown format 'onnx'; allowed: gguf, llama"),
        ({"pad": True}, "a GGUF file holds layers of different sizes: leave pad out"),
        ({"output": "model.Modelfile"}, "model.Modelfile must end in .gguf, by which llama.cpp and ollama know the format"),
        ({"to": "llama", "dtype": "f16"}, "a plain Llama keeps dtype and tokenizer of its checkpoint"),
        ({"tokenizer_from": "config.json"}, "config.json is not a GGUF file"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_any_work(options, message, tmp_path):
    served_checkpoint("unequal KV heads", tmp_path / "model")
    if "tokenizer_from" in options:
        options = {"tokenizer_from": tmp_path / "model" / "config.json"}
    with pytest.raises(gp.UsageError, match=message) as error:
        gp.export(tmp_path / "model", **({"output": tmp_path / "out.gguf"} | options))
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_models_that_gguf_cannot_hold_are_named(tmp_path):
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    served_checkpoint("equal layers", tmp_path / "dynamic", rope_parameters=dynamic)
    with pytest.raises(gp.UsageError, match="unknown RoPE type for GGUF 'dynamic'; allowed: default, linear, yarn, llama3"):
        gp.export(tmp_path / "dynamic", tmp_path / "out.gguf")
    served_checkpoint("equal layers", tmp_path / "gelu", hidden_act="gelu")
    with pytest.raises(gp.UsageError, match="only hidden_act='silu' can be exported, not 'gelu'"):
        gp.export(tmp_path / "gelu", tmp_path / "out.gguf")
    served_checkpoint("equal layers", tmp_path / "small", vocab_size=1000)
    with pytest.raises(gp.UsageError, match="the tokenizer has id 1023, the model embeds 1000"):
        gp.export(tmp_path / "small", tmp_path / "out.gguf")


def test_nothing_is_overwritten_unless_told(tmp_path):
    served_checkpoint("equal layers", tmp_path / "model")
    target = tmp_path / "model.gguf"
    target.write_text("GGUF, mine")
    with pytest.raises(gp.UsageError, match="model.gguf exists already"):
        gp.export(tmp_path / "model", target)
    assert target.read_text() == "GGUF, mine"
    (tmp_path / "other.Modelfile").write_text("mine")
    with pytest.raises(gp.UsageError, match="other.Modelfile exists already"):
        gp.export(tmp_path / "model", tmp_path / "other.gguf")
    assert gp.export(tmp_path / "model", target, overwrite=True).path == target
    with pytest.raises(gp.UsageError, match="would be replaced by the output"):
        gp.export(tmp_path / "model", target, tokenizer_from=target, overwrite=True)


def _spoil(folder: Path, value: float) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_what_fails_half_way_leaves_nothing(tmp_path):
    served_checkpoint("equal layers", tmp_path / "model")
    _spoil(tmp_path / "model", 7e4)
    with pytest.raises(gp.WorkError, match="blk.1.ffn_up.weight holds 7e[+]04, more than float16 can: choose dtype bf16 or f32"):
        gp.export(tmp_path / "model", tmp_path / "out.gguf", dtype="f16")
    _spoil(tmp_path / "model", float("nan"))
    with pytest.raises(gp.WorkError, match="blk.1.ffn_up.weight holds values that are not finite"):
        gp.export(tmp_path / "model", tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_leaves_nothing(tmp_path):
    served_checkpoint("equal layers", tmp_path / "model")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(gp.WorkError, match="cannot write .*out.gguf.*: File too large"):
            gp.export(tmp_path / "model", tmp_path / "out.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
