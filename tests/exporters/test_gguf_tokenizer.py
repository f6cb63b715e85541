"""Tokenizers under the names that llama.cpp has for them, and refusals that name what has none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.served import served_checkpoint
from support.tokenizers_served import TOKENIZERS, save_tokenizer
from transformers import AutoTokenizer

import hf_gqaprune as gp
from hf_gqaprune.checkpoint import resolve_model
from hf_gqaprune.exporters.gguf_tokenizer import converted_tokenizer, copied_tokenizer

SPACE = "\u2581"


def converted(folder: Path, vocabulary: int | None = None) -> dict[str, Any]:
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text('{"model_type": "llama"}')
    return converted_tokenizer(resolve_model(folder), vocabulary or len(AutoTokenizer.from_pretrained(folder)))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_kind_gets_its_name(name, tmp_path):
    save_tokenizer(name, tmp_path)
    keys = converted(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    sentencepiece = name.startswith("llama-2")
    assert keys["tokenizer.ggml.model"] == ("llama" if sentencepiece else "gpt2")
    assert keys["tokenizer.ggml.pre"] == ("default" if sentencepiece else {"demo": "gpt-2"}.get(name, name))
    assert keys["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert keys["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    assert keys["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert keys["tokenizer.ggml.add_bos_token"] == (name in ("demo", "llama-bpe") or sentencepiece)
    assert keys["tokenizer.ggml.add_eos_token"] is False
    types = dict(zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"], strict=True))
    assert types[tokenizer.eos_token] == 3
    if sentencepiece:
        assert (types["<unk>"], types["<0x0A>"], types[SPACE]) == (2, 6, 1)
        assert keys["tokenizer.ggml.add_space_prefix"] is True


def test_ids_without_a_token_are_unused(tmp_path):
    save_tokenizer("demo", tmp_path)
    keys = converted(tmp_path, 1026)
    assert keys["tokenizer.ggml.tokens"][1023:] == [keys["tokenizer.ggml.tokens"][1023], "[PAD1024]", "[PAD1025]"]
    assert keys["tokenizer.ggml.token_type"][1023:] == [1, 5, 5]


def test_everything_that_ends_a_turn_is_written(tmp_path):
    save_tokenizer("demo", tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 1, 7]}')
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    keys = converted(tmp_path)
    assert [keys[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")] == [1, 5, 7]
    assert keys["tokenizer.chat_template"] == "{{ messages }}"


def test_a_copied_tokenizer_is_that_of_the_file(tmp_path):
    served_checkpoint("equal layers", tmp_path / "model")
    base = gp.export(tmp_path / "model", tmp_path / "base.gguf").path
    (tmp_path / "model" / "tokenizer.json").unlink()
    copy = gp.export(tmp_path / "model", tmp_path / "copy.gguf", tokenizer_from=base).path
    assert copied_tokenizer(copy, 1024) == copied_tokenizer(base, 1024) == converted(resolve_model("demo").path, 1024)
    with pytest.raises(gp.UsageError, match="base.gguf has a tokenizer of 1024 tokens, the checkpoint has 1000"):
        copied_tokenizer(base, 1000)


def _set(path: str, value: Any) -> Any:
    def change(spec: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for key in parents:
            spec = spec[int(key)] if key.isdecimal() else spec[key]
        spec[last] = value

    return change


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("demo", _set("normalizer", {"type": "NFC"}), "the normalizer NFC"),
        ("demo", _set("pre_tokenizer", {"type": "Whitespace"}), 'the pre-tokenizer {"type": "Whitespace"}'),
        ("demo", _set("pre_tokenizer.add_prefix_space", True), "the pre-tokenizer .*add_prefix_space"),
        ("demo", _set("model.ignore_merges", True), "the pre-tokenizer GPT-2 with ignore_merges=True"),
        ("demo", _set("added_tokens.1.lstrip", True), "the token '<|end_of_text|>', which takes in the space"),
        ("qwen2", _set("pre_tokenizer.pretokenizers.0.pattern", {"Regex": r"\w+"}), r"the pre-tokenizer \\w\+ with"),
        ("llama-2", lambda spec: spec["model"]["merges"].pop(), "a vocabulary in which .* do not merge to"),
        ("llama-2", _set("normalizer", None), "normalizer null with pre-tokenizer null"),
        ("llama-2 of transformers 5", _set("pre_tokenizer.split", True), "normalizer null with pre-tokenizer .*Metaspace"),
    ],
)
def test_what_has_no_form_is_named(name, change, message, tmp_path):
    save_tokenizer(name, tmp_path)
    path = tmp_path / "tokenizer.json"
    spec = json.loads(path.read_text())
    change(spec)
    path.write_text(json.dumps(spec))
    expected = "the tokenizer has " + message.replace("|", r"\|").replace("(", r"\(").replace("{", r"\{")
    with pytest.raises(gp.UsageError, match=expected) as error:
        converted(tmp_path)
    assert "which GGUF cannot hold: name a GGUF file of the base model by --tokenizer-from" in str(error.value)


def test_other_vocabularies_are_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}})
    )
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "a"}')
    with pytest.raises(gp.UsageError, match="the tokenizer has a WordLevel vocabulary"):
        converted(tmp_path)
