"""Training rows: the windows of calibration, the examples of datasets, their mixtures, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hf_gqaprune import Calibration, UsageError
from hf_gqaprune.configuration import RecoveryConfig
from hf_gqaprune.models import IGNORED
from hf_gqaprune.trainer.data import TrainingData, _token_shares, load_data
from hf_gqaprune.trainer.examples import Row

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)

Write = Callable[..., str]


@pytest.fixture
def jsonl(tmp_path: Path) -> Write:
    def write(name: str, rows: list[dict[str, Any]]) -> str:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def text(tmp_path: Path) -> Write:
    def write(name: str, letters: str, length: int) -> str:
        path = tmp_path / f"{name}.txt"
        path.write_text((letters * length)[:length])
        return str(path)

    return write


def load(
    tokenizer: Any, sources: list[str], *, evaluation: tuple[str, ...] = (), seed: int = 0, vocabulary: int = 259, **changes: Any
) -> TrainingData:
    defaults = {"seq_len": 16, "held_out_tokens": 0, "max_tokens": None, "packing": False}
    config = RecoveryConfig.from_preset(data=sources, **{**defaults, **changes})
    return load_data(tokenizer, config, vocabulary=vocabulary, seed=seed, evaluation=evaluation)


def test_text_windows_are_those_of_calibration(tokenizer: PreTrainedTokenizerFast, text: Write) -> None:
    path = text("letters", "abcdefghijklmnopqrstuvwxyz0123456789", 400)
    data = load(tokenizer, [path])
    windows = Calibration.from_text(tokenizer, [path], samples=26, seq_len=16).ids
    assert sorted(data.train["input_ids"]) == sorted(windows.tolist())
    assert data.train["labels"] == data.train["input_ids"]
    assert not data.packed


def test_prompts_carry_no_loss(tokenizer: PreTrainedTokenizerFast, jsonl: Write) -> None:
    path = jsonl("pairs", [{"prompt": "ab", "completion": "cd"}])
    data = load(tokenizer, [path])
    ids = [tokenizer.bos_token_id, *tokenizer("abcd", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert data.train["input_ids"] == [ids]
    assert data.train["labels"] == [[IGNORED] * 3 + ids[3:]]


def test_alpaca_columns_are_put_into_the_usual_words(tokenizer: PreTrainedTokenizerFast, jsonl: Write) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Sing.", "input": "", "output": "La"},
    ]
    data = load(tokenizer, [jsonl("alpaca", rows)], seq_len=400)
    texts = sorted(tokenizer.batch_decode(list(data.train["input_ids"]), skip_special_tokens=True))
    assert texts == [
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
        "### Response:\n3",
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSing.\n\n### Response:\nLa",
    ]
    scored = [[i for i in labels if i != IGNORED] for labels in data.train["labels"]]
    assert sorted(tokenizer.batch_decode(scored)) == ["3</s>", "La</s>"]


def chatty(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    """`tokenizer` with a chat template."""
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    other.chat_template = template
    return other


def scored(tokenizer: PreTrainedTokenizerFast, data: TrainingData) -> list[str]:
    """The text of each row that carries a loss."""
    return [tokenizer.decode([i for i in labels if i != IGNORED]) for labels in data.train["labels"]]


def test_chats_go_through_the_chat_template(tokenizer: PreTrainedTokenizerFast, jsonl: Write) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path = jsonl("chats", [{"messages": chat}])
    with pytest.raises(UsageError, match="chats holds chats, and the model's tokenizer has no chat template"):
        load(tokenizer, [path], seq_len=64)
    chats = chatty(tokenizer, TEMPLATE)
    data = load(chats, [path], seq_len=64)
    assert chats.decode(data.train["input_ids"][0], skip_special_tokens=True) == "[user]hi[assistant]ho"
    pairs = jsonl("pairs", [{"prompt": chat[:1], "completion": chat[1:]}])
    assert scored(chats, load(chats, [pairs], seq_len=64)) == ["ho"]


def test_only_the_assistant_s_turns_carry_a_loss(tokenizer: PreTrainedTokenizerFast, jsonl: Write) -> None:
    turns = [("user", "hi"), ("assistant", "ho"), ("user", "why"), ("assistant", "so")]
    chat = [{"role": role, "content": content} for role, content in turns]
    path = jsonl("chats", [{"messages": chat}, {"messages": chat[:1]}])
    chats = chatty(tokenizer, TEMPLATE)
    # a chat without a turn of the assistant is left out
    assert scored(chats, load(chats, [path], seq_len=64)) == ["hoso"]
    unmarked = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(UsageError, match="does not mark the assistant's turns, .*: put {% generation %} and {% endgeneration %}"):
        load(chatty(tokenizer, unmarked), [path], seq_len=64)


def test_known_templates_need_no_marks(tokenizer: PreTrainedTokenizerFast, jsonl: Write) -> None:
    from trl.chat_template_utils import qwen2_5_chat_template

    assert "generation %}" not in qwen2_5_chat_template
    path = jsonl("chats", [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}])
    chats = chatty(tokenizer, qwen2_5_chat_template)
    (text,) = scored(chats, load(chats, [path], seq_len=512))
    assert text == "\nho<|im_end|>\n"


def test_an_answer_carries_its_loss_where_the_generation_prompt_is_no_prefix(
    tokenizer: PreTrainedTokenizerFast, jsonl: Write, caplog: pytest.LogCaptureFixture
) -> None:
    """As reasoning models: the prompt ends in `<think>`, which the template strips from a finished turn."""
    template = TEMPLATE.replace("[assistant]{% endif", "[assistant]<think>{% endif")
    chats = chatty(tokenizer, template)
    rows = [
        {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": answer}]}
        for answer in ("seven letters", "no")
    ]
    data = load(chats, [jsonl("pairs", rows)], seq_len=64)
    assert sorted(scored(chats, data)) == ["no", "seven letters"]
    texts = chats.batch_decode(list(data.train["input_ids"]))
    assert sorted(texts) == ["[user]hi[assistant]no", "[user]hi[assistant]seven letters"]
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("hf_gqaprune")]
    assert len(warnings) == 1 and "pairs: the prompt alone ends in '<think>'" in warnings[0]


def test_tokens_beyond_the_embeddings_are_refused(tokenizer: PreTrainedTokenizerFast, text: Write, jsonl: Write) -> None:
    for source in (text("letters", "abc", 400), jsonl("pairs", [{"prompt": "ab", "completion": "cd"}])):
        largest = max(tokenizer(["abcd"[: 3 if "letters" in source else 4]])["input_ids"][0])
        with pytest.raises(UsageError, match=f"token {largest} of (letters|pairs) is beyond the model's {largest} embeddings: give"):
            load(tokenizer, [source], vocabulary=largest)
        assert load(tokenizer, [source], vocabulary=largest + 1).train


def test_named_texts_have_one_split(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UsageError, match="split=validation: demo trains on its split train only"):
        load(tokenizer, ["demo"], split="validation")
    assert load(tokenizer, ["demo"], split="train").sources[0].split == "train"


def test_a_prompt_that_fills_the_row_teaches_nothing(tokenizer: PreTrainedTokenizerFast, jsonl: Write) -> None:
    rows = [{"prompt": "a" * 30, "completion": "b"}, {"prompt": "a", "completion": "b" * 30}]
    data = load(tokenizer, [jsonl("pairs", rows)])
    assert [len(ids) for ids in data.train["input_ids"]] == [16]
    with pytest.raises(UsageError, match="dataset pairs holds no example with text to train on within 16 tokens"):
        load(tokenizer, [jsonl("pairs", rows[:1])])


def test_columns_that_make_no_example_are_listed(tokenizer: PreTrainedTokenizerFast, jsonl: Write) -> None:
    with pytest.raises(UsageError) as caught:
        load(tokenizer, [jsonl("odd", [{"question": "a", "answer": "b"}])])
    assert "has columns question, answer; training needs one of: messages; prompt + completion;" in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "good, bad, message",
    [
        ({"text": "abc"}, {"text": None}, "row 2 of .*odd.* holds None in column 'text', which is not text"),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}, "row 2 of odd holds None in column 'completion'"),
        ({"instruction": "a", "output": "b"}, {"instruction": 3, "output": "b"}, "row 2 of odd holds"),
        ({"messages": [{"role": "user", "content": "a"}]}, {"messages": None}, "row 2 of odd holds None in column 'messages'"),
        ({"messages": [{"role": "user"}]}, {"messages": []}, "does not accept a chat of dataset odd: .*content"),
        ({"question": "a"}, {"question": "b"}, "has columns question; training needs one of"),
    ],
)
def test_rows_without_text_are_named(
    tokenizer: PreTrainedTokenizerFast, jsonl: Write, good: dict[str, Any], bad: dict[str, Any], message: str, streaming: bool
) -> None:
    chats = chatty(tokenizer, "{% for m in messages %}{% generation %}{{ m.role + m.content }}{% endgeneration %}{% endfor %}")
    with pytest.raises(UsageError, match=message) as caught:
        load(chats, [jsonl("odd", [good, bad])], streaming=streaming, max_tokens=10_000)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_without_rows_is_refused(tokenizer: PreTrainedTokenizerFast, jsonl: Write, streaming: bool) -> None:
    with pytest.raises(UsageError, match="dataset .*empty.jsonl holds no rows"):
        load(tokenizer, [jsonl("empty", [])], streaming=streaming, max_tokens=100)


def test_the_folder_of_one_split_is_that_split(tokenizer: PreTrainedTokenizerFast, jsonl: Write, tmp_path: Path) -> None:
    from datasets import Split, load_dataset

    path = jsonl("rows", [{"text": "abc" * 20}])
    for name in ("train", "test"):
        load_dataset("json", data_files={name: path}, split=Split(name)).save_to_disk(str(tmp_path / name))
    assert len(load(tokenizer, [str(tmp_path / "train")]).train) == 4
    with pytest.raises(UsageError, match="is split 'test', not 'train'"):
        load(tokenizer, [str(tmp_path / "test")])


def test_a_split_that_does_not_exist_is_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_dict({"text": ["abc" * 20]})}).save_to_disk(str(tmp_path / "saved"))
    assert len(load(tokenizer, [str(tmp_path / "saved")]).train) == 4
    with pytest.raises(UsageError, match="has no split 'extra'; it has: train"):
        load(tokenizer, [str(tmp_path / "saved")], split="extra")


def test_sources_share_the_tokens_by_weight(tokenizer: PreTrainedTokenizerFast, text: Write) -> None:
    one, two = text("one", "abc", 4000), text("two", "xyz", 4000)
    data = load(tokenizer, [one, two], max_tokens=1600)
    assert [source.tokens for source in data.sources] == [800, 800]
    data = load(tokenizer, [f"{one}=3", two], max_tokens=1600)
    assert [source.tokens for source in data.sources] == [1200, 400]
    assert [source.weight for source in data.sources] == [3.0, 1.0]
    assert len(data.train) == 100


def test_what_a_short_source_lacks_comes_from_the_others(tokenizer: PreTrainedTokenizerFast, text: Write) -> None:
    short, long = text("short", "abc", 150), text("long", "xyz", 6000)
    data = load(tokenizer, [short, long], max_tokens=1600)
    assert [source.tokens for source in data.sources] == [160, 1440]


def test_text_repeats_only_when_all_is_used_up(tokenizer: PreTrainedTokenizerFast, text: Write) -> None:
    path = text("cycle", "abcdefghijklmnopqrstuvwxyz0123456789_", 150)
    data = load(tokenizer, [path], max_tokens=400)
    counts = [data.train["input_ids"].count(ids) for ids in data.train["input_ids"]]
    assert len(counts) == 25 and set(counts) == {2, 3}


@given(st.lists(st.tuples(st.integers(1, 30), st.floats(0.1, 10)), min_size=1, max_size=5), st.integers(1, 800))
def test_the_budget_is_met_whatever_the_sources(sources: list[tuple[int, float]], budget: int) -> None:
    pools = [[Row([0] * 10)] * rows for rows, _ in sources]
    shares = _token_shares(pools, [weight for _, weight in sources], budget)
    assert abs(sum(shares) - budget) <= len(shares)
    passes = budget // sum(10 * rows for rows, _ in sources)
    for share, (rows, _) in zip(shares, sources, strict=True):
        assert passes * rows * 10 <= share <= (passes + 1) * rows * 10


def test_held_out_rows_never_train(tokenizer: PreTrainedTokenizerFast, text: Write) -> None:
    one = text("one", "abcdefghijklmnopqrstuvwxyz0123456789_", 1500)
    two = text("two", "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+", 1500)
    data = load(tokenizer, [one, two], held_out_tokens=10_000)
    held_out = {tuple(ids) for ids in data.held_out["input_ids"]}
    assert len(data.held_out) == 10
    letters = [sum(tokenizer.decode(ids[1:]).isupper() for ids in held_out)]
    assert 0 < letters[0] < 10
    rows = len(data.train) + len(data.held_out)
    assert rows == 200


def test_the_seed_decides_order_and_choice(tokenizer: PreTrainedTokenizerFast, text: Write) -> None:
    path = text("letters", "abcdefghijklmnopqrstuvwxyz0123456789_", 3000)
    rows = [load(tokenizer, [path], max_tokens=800, seed=seed).train["input_ids"] for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]


def test_a_stream_is_read_no_further_than_needed(tokenizer: PreTrainedTokenizerFast, jsonl: Write) -> None:
    path = jsonl("many", [{"prompt": f"{i}", "completion": "abcdefgh"} for i in range(500)])
    data = load(tokenizer, [path], streaming=True, max_tokens=120)
    texts = tokenizer.batch_decode(list(data.train["input_ids"]), skip_special_tokens=True)
    assert sorted(texts) == sorted(f"{i}abcdefgh" for i in range(len(texts)))
    assert 10 <= len(texts) <= 12
    lines = jsonl("lines", [{"text": "abcdefghijklmn"}] * 100)
    assert len(load(tokenizer, [lines], streaming=True, max_tokens=160).train) == 10


def test_packed_examples_do_not_see_each_other(
    tokenizer: PreTrainedTokenizerFast, llama: LlamaForCausalLM, jsonl: Write
) -> None:
    """The loss of a packed batch is that of its examples, each alone."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows = [{"prompt": "abc"[: i % 3 + 1], "completion": "some words here"[: 4 + i]} for i in range(6)]
    path = jsonl("pairs", rows)
    alone, packed = load(tokenizer, [path], seq_len=24), load(tokenizer, [path], seq_len=24, packing=True)
    assert packed.packed and len(packed.train) < len(alone.train) == 6
    nats = {}
    for name, data, free in (("alone", alone, False), ("packed", packed, True)):
        collator = DataCollatorForLanguageModeling(pad_token_id=2, padding_free=free)
        batch = collator([data.train[i] for i in range(len(data.train))])
        given_ = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
        with torch.no_grad():
            logits = llama(**given_, use_cache=False).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        nats[name] = torch.nn.functional.cross_entropy(
            logits[labels != IGNORED], labels[labels != IGNORED], reduction="sum"
        )
    assert float(nats["packed"]) == pytest.approx(float(nats["alone"]), rel=1e-5)
