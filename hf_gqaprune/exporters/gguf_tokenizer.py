"""Convert a Hugging Face tokenizer to the keys of a GGUF header, or copy those of another GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint import ModelFolder
from ..errors import UsageError, on_one_line

#: what the file says of a token
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "\u2581"
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
#: (steps of a byte-level pre-tokenizer, `ignore_merges` of its BPE) -> name of what does the same in llama.cpp
_PRE_TOKENIZERS = {
    (("GPT-2",), False): "gpt-2",
    (("single digits", "GPT-2"), False): "smollm",
    ((_LLAMA_3,), True): "llama-bpe",
    ((_LLAMA_3,), False): "smaug-bpe",
    ((_QWEN_2,), False): "qwen2",
}


def copied_tokenizer(path: Path, vocabulary: int) -> dict[str, Any]:
    """Read the tokenizer keys of the GGUF file `path`. Raises [`UsageError`] unless it has `vocabulary` tokens."""
    from gguf import GGUFReader, Keys

    try:
        fields = GGUFReader(path).fields
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a GGUF file: {on_one_line(error)}") from error
    keys = {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}
    tokens = keys.get(Keys.Tokenizer.LIST, [])
    if len(tokens) != vocabulary:
        raise UsageError(
            f"{path} has a tokenizer of {len(tokens)} tokens, the checkpoint has {vocabulary}: give a file of its base model"
        )
    return keys


def converted_tokenizer(folder: ModelFolder, vocabulary: int) -> dict[str, Any]:
    """Tokenizer keys for the Hugging Face tokenizer in `folder`: the same tokens for the same text.

    Args:
        vocabulary: rows of the embeddings; ids without a token become unused ones.

    Raises:
        UsageError: a tokenizer that does something llama.cpp has no name for, which is named.
    """
    tokenizer = folder.tokenizer
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise _no_form(folder, f"{type(tokenizer).__name__} without a tokenizer.json")
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model = spec["model"]
    if model["type"] != "BPE":
        raise _no_form(folder, f"a {model['type']} vocabulary")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model[option]:
            raise _no_form(folder, f"{option}={model[option]!r}")
    tokens, types = _tokens(folder, spec, vocabulary)
    keys = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        **(_sentencepiece(folder, spec, tokens, types) if model["byte_fallback"] else _byte_level(folder, spec)),
        **_special_tokens(folder, tokenizer),
        **_frame(folder, tokenizer),
    }
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    return keys | ({"tokenizer.chat_template": template} if template else {})


def _tokens(folder: ModelFolder, spec: Mapping[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """List the text and the type of every id."""
    tokens = [f"[PAD{index}]" for index in range(vocabulary)]
    types = [_UNUSED] * vocabulary
    known = {index: (token, _NORMAL) for token, index in spec["model"]["vocab"].items()}
    for added in spec["added_tokens"]:
        if any(added[side] for side in ("lstrip", "rstrip", "single_word")):
            raise _no_form(folder, f"the token {added['content']!r}, which takes in the space beside it or stands alone")
        known[added["id"]] = added["content"], _CONTROL if added["special"] else _USER_DEFINED
    if max(known) >= vocabulary:
        raise UsageError(
            f"{folder}: the tokenizer has id {max(known)}, the model embeds {vocabulary}: put the tokenizer of the model there"
        )
    for index, (token, kind) in known.items():
        tokens[index], types[index] = token, kind
    return tokens, types


def _byte_level(folder: ModelFolder, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a byte-level BPE, as GPT-2's and Llama 3's."""
    if spec["normalizer"] is not None:
        raise _no_form(folder, f"the normalizer {spec['normalizer']['type']}")
    pre = spec["pre_tokenizer"] or {"type": "none"}
    *steps, last = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        raise _no_form(folder, f"the pre-tokenizer {json.dumps(last)}")
    described = tuple(map(_described, steps)) + (("GPT-2",) if last["use_regex"] else ())
    ignore_merges = spec["model"]["ignore_merges"]
    if (described, ignore_merges) not in _PRE_TOKENIZERS:
        raise _no_form(folder, f"the pre-tokenizer {' + '.join(described)} with ignore_merges={ignore_merges}")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _PRE_TOKENIZERS[described, ignore_merges],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in _merges(spec)],
    }


def _described(step: Mapping[str, Any]) -> str:
    """Describe a step of a pre-tokenizer as `_PRE_TOKENIZERS` does, or by its JSON."""
    if step["type"] == "Digits" and step["individual_digits"]:
        return "single digits"
    if step["type"] == "Split" and (step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True)):
        # every character matches, so that nothing is between the matches
        return str(step["pattern"].get("Regex"))
    return json.dumps(step)


def _sentencepiece(folder: ModelFolder, spec: Mapping[str, Any], tokens: Sequence[str], types: list[int]) -> dict[str, Any]:
    """Keys of a SentencePiece BPE vocabulary, as Llama 2's; marks bytes and the unknown token in `types`.

    SentencePiece joins the two neighbours whose union has the best score, whatever they are; so a token's score follows
    from the ranks of its merges, and every pair that makes a token must be among them.
    """
    model, merges = spec["model"], _merges(spec)
    pairs, scores = set(merges), _scores(merges)
    for token, index in model["vocab"].items():
        if types[index] != _NORMAL:
            continue
        if token.startswith("<0x") and len(token) == 6:
            types[index] = _BYTE
        for left, right in ((token[:cut], token[cut:]) for cut in range(1, len(token))):
            if left in model["vocab"] and right in model["vocab"] and (left, right) not in pairs:
                raise _no_form(folder, f"a vocabulary in which {left!r} and {right!r} do not merge to {token!r}")
    if model["unk_token"] is not None:
        types[model["vocab"][model["unk_token"]]] = _UNKNOWN
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [scores.get(token, 0.0) for token in tokens],
        "tokenizer.ggml.add_space_prefix": _space_prefix(folder, spec),
    }


def _scores(merges: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Score of each token that is merged: the lower the ranks of its merges, the higher.

    Tokens whose ranks interleave had one score in SentencePiece, as Llama 2's runs of spaces have.
    """
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        first.setdefault(left + right, rank)
        last[left + right] = rank
    scores: dict[str, float] = {}
    end = score = -1
    for token, rank in first.items():
        if rank > end:
            score = rank
        end = max(end, last[token])
        scores[token] = -float(score)
    return scores


def _space_prefix(folder: ModelFolder, spec: Mapping[str, Any]) -> bool:
    """Tell whether a space is put before the text; all SentencePiece vocabularies write other spaces as U+2581."""
    normalizer, pre = spec["normalizer"], spec["pre_tokenizer"]
    if normalizer is None and pre and pre["type"] == "Metaspace" and pre["replacement"] == _SPACE and not pre["split"]:
        return bool(pre["prepend_scheme"] != "never")
    steps = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if pre is None and steps in ([{"type": "Prepend", "prepend": _SPACE}, replace], [replace]):
        return len(steps) == 2
    raise _no_form(folder, f"normalizer {json.dumps(normalizer)} with pre-tokenizer {json.dumps(pre)}")


def _merges(spec: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs in the order of their rank; older files have them as one text each."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in spec["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _special_tokens(folder: ModelFolder, tokenizer: Any) -> dict[str, Any]:
    """Ids of special tokens, and of everything that ends a turn."""
    stops = _stop_ids(folder)
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(stops), None)
    if end is None:
        raise UsageError(
            f"{folder}: neither tokenizer nor config has an EOS token, and llama.cpp would take token 11: set eos_token_id"
        )
    # without a key llama.cpp makes token 11 of a byte-level vocabulary its BOS
    start = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    keys = {"tokenizer.ggml.bos_token_id": start, "tokenizer.ggml.eos_token_id": end}
    more = (("unknown", tokenizer.unk_token_id), ("padding", tokenizer.pad_token_id))
    keys |= {f"tokenizer.ggml.{name}_token_id": index for name, index in more if index is not None}
    others = [index for index in stops if index != end]
    # the file has two more places; tokens beyond them stop where llama.cpp knows their names
    return keys | {f"tokenizer.ggml.{name}_token_id": index for name, index in zip(("eot", "eom"), others, strict=False)}


def _stop_ids(folder: ModelFolder) -> list[int]:
    """Ids at which `generate` stops."""
    for name in ("generation_config.json", "config.json"):
        path = folder.path / name
        if path.is_file() and (stops := json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")) is not None:
            return stops if isinstance(stops, list) else [stops]
    return []


def _frame(folder: ModelFolder, tokenizer: Any) -> dict[str, Any]:
    """Tell whether BOS and EOS are put around a text, by tokenizing one."""
    plain, framed = (tokenizer.encode("x", add_special_tokens=special) for special in (False, True))
    options = {
        (bos, eos): [*[tokenizer.bos_token_id] * bos, *plain, *[tokenizer.eos_token_id] * eos]
        for bos in (False, True)
        for eos in (False, True)
    }
    for (bos, eos), ids in options.items():
        if ids == framed:
            return {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
    raise _no_form(folder, f"{tokenizer.convert_ids_to_tokens(framed)} for 'x'")


def _no_form(folder: ModelFolder, what: str) -> UsageError:
    return UsageError(
        f"{folder}: the tokenizer has {what}, which GGUF cannot hold: name a GGUF file of the base model by --tokenizer-from"
    )
