"""The embedded demo: its text is the same everywhere and tells the truth, its model has learned it."""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gqaprune.data import demo
from hf_gqaprune.errors import UsageError

VALUE = {word: number for number, word in enumerate(demo.NUMBERS)}


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture(scope="module")
def test_text() -> str:
    return demo.demo_text("test")


def test_a_fresh_process_writes_the_same_text() -> None:
    code = (
        "import hashlib; from hf_gqaprune.data import demo; "
        "print(*(hashlib.sha256(demo.demo_text(split, 20_000).encode()).hexdigest() for split in demo.DEMO_SPLITS))"
    )
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert fresh == [sha256(demo.demo_text(split, 20_000)) for split in demo.DEMO_SPLITS]


def test_the_text_the_model_was_measured_on_is_unchanged(test_text: str) -> None:
    assert sha256(test_text) == "769182788c9a6448b51292f60ba1164beff224896ad3bbdf6e95ceabcb6711fb"


@pytest.mark.parametrize("split", demo.DEMO_SPLITS)
def test_lengths(split: str) -> None:
    length = demo.DEMO_SPLITS[split][1]
    assert length <= len(demo.demo_text(split)) < length + 2_000
    short = demo.demo_text(split, 5_000)
    assert 5_000 <= len(short) < 7_000
    assert demo.demo_text(split).startswith(short.rstrip("\n"))


def test_splits_share_no_story() -> None:
    stories = {split: demo.demo_text(split).strip().split("\n\n") for split in demo.DEMO_SPLITS}
    every = [story for split in stories.values() for story in set(split)]
    assert len(every) == len(set(every)) > 5_000


def test_about_six_hundred_words() -> None:
    assert 500 <= len(set(re.findall(r"[a-z]+", demo.demo_text("train").lower()))) <= 700


def test_sums_are_right(test_text: str) -> None:
    more = re.findall(r"had (\w+) \w+\. Then \w+ \w+ (\w+) more, so \w+ had (\w+) \w+\.", test_text)
    less = re.findall(r"had (\w+) \w+\. Then \w+ [\w ]+? (\w+) of them, so \w+ had (\w+) \w+ left\.", test_text)
    both = re.findall(r"had (\w+) \w+ and \w+ had (\w+) \w+, so together they had (\w+) \w+\.", test_text)
    assert min(len(more), len(less), len(both)) > 20
    assert all(VALUE[a] + VALUE[b] == VALUE[c] for a, b, c in more + both)
    assert all(VALUE[a] - VALUE[b] == VALUE[c] for a, b, c in less)
    assert len(more) == test_text.count(" more, so ") and len(less) == test_text.count(" left.")
    assert len(both) == test_text.count("together they had")


def test_one_is_singular_and_all_else_plural(test_text: str) -> None:
    counted = re.findall(rf"had ({'|'.join(demo.NUMBERS)}) (\w+)", test_text)
    singular = {noun for number, noun in counted if number == "one"}
    plural = {noun for number, noun in counted if number != "one"}
    assert len(singular) > 10 and len(plural) > 40
    assert not singular & plural


def test_later_questions_are_answered_as_told(test_text: str) -> None:
    asked = 0
    for story in test_text.split("\n\n"):
        for noun, answer in re.findall(r"How many (\w+) did \w+ have in the end\? \w+ had (\w+ \w+)\.", story):
            told = story[: story.index(f"How many {noun} did")]
            assert re.search(rf"(?:more|of them), so \w+ had {answer}\b", told)
            asked += 1
        for item, place, former in re.findall(
            r"Where was (the [\w ]+)\? The [\w ]+ was ([\w ]+), not ([\w ]+)\.", story
        ):
            assert re.search(
                rf"put {item} {former}\. Later \w+ carried it away and left it {place}\.",
                story[: story.index(f"Where was {item}?")],
            )
            asked += 1
    assert asked > 50


def test_bad_requests() -> None:
    with pytest.raises(UsageError, match=r"unknown split of the demo text 'tset' \(did you mean 'test'\?\)"):
        demo.demo_text("tset")
    for chars in (0, -1):
        with pytest.raises(UsageError, match=f"cannot write {chars} characters"):
            demo.demo_text("test", chars)


def test_the_folder_is_complete_and_small() -> None:
    files = {file.name: file.stat().st_size for file in demo.demo_model_path().iterdir()}
    assert sum(files.values()) < 5_000_000
    assert {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    } == set(files)  # fmt: skip
    config = json.loads((demo.demo_model_path() / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["model_type"] == "llama"


def test_the_tokenizer_gives_back_every_text(test_text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.demo_model_path())
    sample = test_text[:20_000] + " Größe 値段 €5\t\n"
    assert tokenizer.decode(tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"]) == sample
    assert tokenizer("Anna")["input_ids"][0] == tokenizer.bos_token_id != tokenizer.eos_token_id
    assert tokenizer.model_max_length == 512
    assert len(tokenizer) == 1024


def test_the_model_has_learned_the_stories(test_text: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo.demo_model_path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo.demo_model_path())
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads) == (32, 8)
    assert config.max_position_embeddings == tokenizer.model_max_length
    assert (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert 1_000_000 <= model.num_parameters() <= 2_000_000

    ids = tokenizer(test_text, add_special_tokens=False, verbose=False)["input_ids"]
    counts = Counter(ids)
    unigram = math.exp(-sum(n / len(ids) * math.log(n / len(ids)) for n in counts.values()))
    windows = torch.tensor(ids[: 64 * 127]).view(64, 127)
    windows = torch.cat([torch.full((64, 1), tokenizer.bos_token_id), windows], dim=1)
    with torch.inference_mode():
        perplexity = math.exp(model(windows, labels=windows).loss.item())
    assert unigram > 100
    assert perplexity < unigram / 20
