"""Small tokenizers of every kind that a GGUF file has a name for."""

from __future__ import annotations

import shutil
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hf_gqaprune.data.demo import demo_model_path, demo_text
from hf_gqaprune.exporters.gguf_tokenizer import _LLAMA_3, _QWEN_2

from .served import unicode_lines

_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), _BYTE_LEVEL])


#: what `tokenizer.ggml.pre` becomes -> (pre-tokenizer, `ignore_merges`); the others are made otherwise
_BYTE_LEVELS = {
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False), False),
    "smollm": (
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        False,
    ),
    "llama-bpe": (_split(_LLAMA_3), True),
    "smaug-bpe": (_split(_LLAMA_3), False),
    "qwen2": (_split(_QWEN_2), False),
}
TOKENIZERS = ("demo", *_BYTE_LEVELS, "llama-2", "llama-2 of transformers 5")


def save_tokenizer(name: str, folder: Path) -> None:
    """Save the tokenizer `name` of `TOKENIZERS` to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    if name == "demo":
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(demo_model_path() / file, folder / file)
    else:
        (_byte_level(name) if name in _BYTE_LEVELS else _sentencepiece(name)).save_pretrained(folder)


def _texts() -> list[str]:
    return [*unicode_lines(2000, seed=1), demo_text("calibration", 100_000)]


def _byte_level(name: str) -> PreTrainedTokenizerFast:
    pre_tokenizer, ignore_merges = _BYTE_LEVELS[name]
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<|begin|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_texts(), trainer)
    if name == "llama-bpe":
        backend.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|im_end|>")


def _sentencepiece(name: str) -> PreTrainedTokenizerFast:
    """As transformers converts SentencePiece's vocabularies: every pair that makes a token is a merge, by its score."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learned.train_from_iterator(_texts(), trainers.BpeTrainer(vocab_size=1500, show_progress=False))
    pieces = sorted(learned.get_vocab(), key=learned.get_vocab().__getitem__)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    merges = [
        (token[:cut], token[cut:])
        for token in pieces
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if name == "llama-2":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
