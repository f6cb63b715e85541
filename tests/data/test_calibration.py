"""Calibration windows: what is in them, how many come from where, and that they never change by chance."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gqaprune import Calibration
from hf_gqaprune.data import windows as windows_module
from hf_gqaprune.data.calibration import _interleaved, _shares, _spread
from hf_gqaprune.data.text import parse_weight
from hf_gqaprune.data.windows import LOGITS_PER_BATCH, TOKENS_PER_BATCH, split_batches
from hf_gqaprune.errors import UsageError


def numbered(folder: Path, name: str, words: int, letter: str) -> str:
    """A file of `words` different four-letter words, one token a letter: `a000a001...`."""
    path = folder / name
    path.write_text("".join(f"{letter}{index:03d}" for index in range(words)), encoding="utf-8")
    return str(path)


def test_windows_are_bos_and_consecutive_text(tokenizer: Any, tmp_path: Path) -> None:
    source = numbered(tmp_path, "books.txt", 100, "a")
    calibration = Calibration.from_text(tokenizer, source, samples=10, seq_len=9)
    assert calibration.ids.shape == (10, 9)
    assert calibration.ids.dtype == torch.long
    assert calibration.tokens == 90
    assert calibration.ids[:, 0].tolist() == [tokenizer.bos_token_id] * 10
    text = Path(source).read_text(encoding="utf-8")
    starts = [text.index(tokenizer.decode(row[1:])) for row in calibration.ids]
    assert starts == sorted(starts)
    assert len(set(starts)) == 10
    assert all(start % 8 == 0 for start in starts)
    # 50 windows, one from every fifth of ten
    assert [start // 40 for start in starts] == list(range(10))


def test_without_a_bos_token_every_token_is_text(tokenizer: Any, tmp_path: Path) -> None:
    source = numbered(tmp_path, "books.txt", 10, "a")
    bare = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>")
    calibration = Calibration.from_text(bare, [source], samples=5, seq_len=8)
    assert "".join(bare.decode(row) for row in calibration.ids) == Path(source).read_text(encoding="utf-8")


def test_the_sources_are_recorded(tokenizer: Any, tmp_path: Path) -> None:
    source = numbered(tmp_path, "books.txt", 100, "a")
    (record,) = Calibration.from_text(tokenizer, source, samples=4, seq_len=9).record()
    assert (record["name"], record["windows"], record["weight"]) == ("books", 4, 1.0)
    assert len(record["sha256"]) == 64


def letters(calibration: Calibration, tokenizer: Any) -> Counter[str]:
    return Counter(tokenizer.decode(row[1:2]) for row in calibration.ids)


def test_weights_share_the_windows(tokenizer: Any, tmp_path: Path) -> None:
    first, second = numbered(tmp_path, "first.txt", 100, "a"), numbered(tmp_path, "second.txt", 100, "b")
    equal = Calibration.from_text(tokenizer, [first, second], samples=16, seq_len=9)
    assert letters(equal, tokenizer) == {"a": 8, "b": 8}
    weighted = Calibration.from_text(tokenizer, [f"{first}=0.75", f"{second}=0.25"], samples=16, seq_len=9)
    assert letters(weighted, tokenizer) == {"a": 12, "b": 4}
    assert [source.weight for source in weighted.sources] == [0.75, 0.25]
    assert sum(source.windows for source in weighted.sources) == 16


def test_what_a_short_source_lacks_comes_from_the_others(tokenizer: Any, tmp_path: Path) -> None:
    short, long = numbered(tmp_path, "short.txt", 6, "a"), numbered(tmp_path, "long.txt", 100, "b")
    calibration = Calibration.from_text(tokenizer, [short, long], samples=16, seq_len=9)
    assert letters(calibration, tokenizer) == {"a": 3, "b": 13}


@pytest.mark.parametrize(
    ("weights", "held_out"),
    [((1, 1), (2, 2)), ((3, 1), (3, 1)), ((1, 1, 1, 1), (1, 1, 1, 1)), ((2, 1, 1), (2, 1, 1))],
)
def test_held_out_windows_are_one_in_eight_of_every_source(
    weights: tuple[int, ...], held_out: tuple[int, ...], tokenizer: Any, tmp_path: Path
) -> None:
    named = [(letter, numbered(tmp_path, f"{letter}.txt", 400, letter)) for letter in "abcd"[: len(weights)]]
    sources = [f"{path}={weight}" for (_, path), weight in zip(named, weights, strict=True)]
    calibration = Calibration.from_text(tokenizer, sources, samples=32, seq_len=9)
    assert calibration.held_out.shape == (4, 9)
    assert torch.equal(calibration.held_out, calibration.ids[7::8])
    assert calibration.fitted.shape == (28, 9)
    rows = [tuple(row.tolist()) for part in (calibration.held_out, calibration.fitted) for row in part]
    assert sorted(rows) == sorted(tuple(row.tolist()) for row in calibration.ids)
    found = letters(Calibration.from_ids(calibration.held_out), tokenizer)
    assert [found[letter] for letter, _ in named] == list(held_out)


def test_three_even_sources_are_taken_in_turn() -> None:
    assert [source for source, _ in _interleaved([16, 16, 16])] == 16 * [0, 1, 2]


def test_the_seed_decides(tokenizer: Any, tmp_path: Path) -> None:
    source = numbered(tmp_path, "books.txt", 400, "a")

    def drawn(seed: int) -> torch.Tensor:
        return Calibration.from_text(tokenizer, source, samples=12, seq_len=9, seed=seed).ids

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


def test_batches_hold_all_windows_in_order() -> None:
    ids = torch.arange(40 * 1024).view(40, 1024)
    batches = list(split_batches(ids, 1000))
    assert [batch.numel() for batch in batches] == [TOKENS_PER_BATCH] * 5
    assert torch.equal(torch.cat(batches), ids)
    # a large vocabulary makes for fewer tokens, a long window is never cut
    assert [len(batch) for batch in split_batches(ids[:3], LOGITS_PER_BATCH // 2048)] == [2, 1]
    assert [tuple(batch.shape) for batch in split_batches(torch.arange(20_000).view(2, -1), 10)] == [(1, 10_000)] * 2
    assert not list(split_batches(ids[:0], 10))


def test_a_dataset_is_a_source(tokenizer: Any) -> None:
    data = Dataset.from_dict({"body": ["abcdefgh", "ijklmnop"]})
    calibration = Calibration.from_text(tokenizer, data, samples=2, seq_len=9, text_column="body")
    assert [tokenizer.decode(row[1:]) for row in calibration.ids] == ["abcdefgh", "\n\nijklmn"]
    with pytest.raises(UsageError, match="the dataset has no column 'text'; it has: body"):
        Calibration.from_text(tokenizer, data, samples=2, seq_len=9)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0.01, 10), st.integers(0, 30)), min_size=1, max_size=5), st.data())
def test_shares_add_up_and_fit(sources: list[tuple[float, int]], data: st.DataObject) -> None:
    capacity = [room for _, room in sources]
    samples = data.draw(st.integers(0, sum(capacity)))
    counts = _shares(samples, [weight for weight, _ in sources], capacity, 9)
    assert sum(counts) == samples
    assert all(0 <= count <= room for count, room in zip(counts, capacity, strict=True))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(0, 200), st.integers(0, 9))
def test_spread_takes_one_from_each_stretch(total: int, count: int, seed: int) -> None:
    import random

    count = min(count, total)
    picked = _spread(total, count, random.Random(seed))
    assert picked == sorted(set(picked))
    assert len(picked) == count
    edges = [total * i // count for i in range(count + 1)] if count else []
    assert all(a <= index < b for index, a, b in zip(picked, edges, edges[1:], strict=False))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("books.txt", ("books.txt", 1.0)),
        ("books.txt=0.7", ("books.txt", 0.7)),
        ("a=b.txt", ("a=b.txt", 1.0)),
        ("a=b.txt=2", ("a=b.txt", 2.0)),
    ],
)
def test_weights_are_read_from_the_end(source: str, expected: tuple[str, float]) -> None:
    assert parse_weight(source) == expected


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_weights_must_be_positive(weight: str) -> None:
    with pytest.raises(UsageError, match=f"weight {weight} of books.txt must be positive and finite"):
        parse_weight(f"books.txt={weight}")


def test_bad_text_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    def draw(sources: Any, **kwargs: Any) -> None:
        Calibration.from_text(tokenizer, sources, **({"samples": 4, "seq_len": 9} | kwargs))

    source = numbered(tmp_path, "books.txt", 10, "a")
    with pytest.raises(UsageError, match="holds 5 windows of 9 tokens, 6 are asked for: .* --samples 5"):
        draw(source, samples=6)
    with pytest.raises(UsageError, match="books has 40 tokens, fewer than one window of 63: give more text or lower"):
        draw(source, seq_len=64)
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(UsageError, match="empty"):
        draw(str(tmp_path / "empty.txt"))
    with pytest.raises(UsageError, match="absent.txt"):
        draw(str(tmp_path / "absent.txt"))
    with pytest.raises(UsageError, match="no calibration text was named"):
        draw([])
    for sizes in ({"samples": 0}, {"seq_len": 1}, {"samples": -3}):
        with pytest.raises(UsageError, match="at least 1 window of 2 tokens"):
            draw(source, **sizes)


@pytest.mark.parametrize("ids", [torch.arange(4), torch.arange(2)[:, None], torch.ones(2, 4)])
def test_ids_of_another_shape_or_type_are_refused(ids: torch.Tensor) -> None:
    with pytest.raises(UsageError, match="calibration ids must be int64 of shape"):
        Calibration.from_ids(ids)


def test_paths_are_texts_also_with_an_equals_sign(tokenizer: Any, tmp_path: Path) -> None:
    source = Path(numbered(tmp_path, "rate=0.5", 100, "a"))
    of_path, of_name = (Calibration.from_text(tokenizer, s, samples=4, seq_len=9) for s in (source, [str(source)]))
    assert of_path == of_name and of_path.sources[0].weight == 1.0
    weighted = Calibration.from_text(tokenizer, f"{source}=0.25", samples=4, seq_len=9)
    assert weighted.sources[0].weight == 0.25


def test_calibrations_compare(tokenizer: Any, tmp_path: Path) -> None:
    source = numbered(tmp_path, "books.txt", 100, "a")
    first, same, other = (Calibration.from_text(tokenizer, source, samples=4, seq_len=9, seed=s) for s in (0, 0, 1))
    assert first == same and first != other and first != 4


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Dataset.from_dict({"text": ["some text", None]}), "row 2 of the dataset holds None in column 'text'"),
        (DatasetDict(train=Dataset.from_dict({"text": ["a"]})), "this is a mapping of train, not a text: pass one of them"),
    ],
)
def test_datasets_without_text_are_refused(tokenizer: Any, data: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Calibration.from_text(tokenizer, data, samples=1, seq_len=9)


def test_of_a_very_long_text_only_parts_are_tokenized(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "long.txt"
    source.write_text(" ".join(f"a{index:04d}" for index in range(5_000)), encoding="utf-8")
    whole = Calibration.from_text(tokenizer, source, samples=4, seq_len=9)
    monkeypatch.setattr(windows_module, "_WHOLE", 2_000)
    monkeypatch.setattr(windows_module, "_PART", 500)
    seen: list[str] = []
    real = windows_module.token_ids
    monkeypatch.setattr(windows_module, "token_ids", lambda t, text: seen.append(text) or real(t, text))
    parts = Calibration.from_text(tokenizer, source, samples=4, seq_len=9)
    assert parts.ids.shape == whole.ids.shape and parts.sources == whole.sources
    assert sum(map(len, seen)) <= 2_500 < len(source.read_text())
    text = source.read_text(encoding="utf-8")
    starts = [text.index(tokenizer.decode(row[1:])) for row in parts.ids]
    # from all over the text
    assert starts == sorted(starts) and starts[-1] > len(text) // 2
    # too few windows in the parts: all of it
    every = len(real(tokenizer, text)) // 8
    assert Calibration.from_text(tokenizer, source, samples=every, seq_len=9).ids.shape == (every, 9)
