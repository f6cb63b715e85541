"""Shards: what safetensors writes is read, what it would write is written, and a file that lies is found out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hf_gqaprune import UsageError, WorkError
from hf_gqaprune.checkpoint import identity
from hf_gqaprune.checkpoint.identity import fingerprint_of_digests as fingerprint
from hf_gqaprune.checkpoint.reader import DTYPES, INDEX, WEIGHTS, Checkpoint, read_header
from hf_gqaprune.checkpoint.writer import ShardWriter


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Any bytes; a truth value is 0 or 1."""
    values = torch.randint(
        0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), dtype=torch.uint8,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    return values.view(dtype).view(shape)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6).filter(lambda name: name != "__metadata__")


@settings(max_examples=60, deadline=None)
@given(
    entries=st.dictionaries(names, st.tuples(shapes, st.sampled_from(list(DTYPES.values()))), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_reads_what_safetensors_wrote(tmp_path_factory: pytest.TempPathFactory, entries: dict[str, Any], seed: int) -> None:
    folder = tmp_path_factory.mktemp("shards")
    save_file({name: random_tensor(*entry, seed) for name, entry in entries.items()}, folder / WEIGHTS)
    expected = load_file(folder / WEIGHTS)
    with Checkpoint(folder) as checkpoint:
        assert checkpoint.tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            assert same(checkpoint.read(name), tensor)
            pieces = [piece.view(-1) for piece in checkpoint.chunks(name)]
            assert same(torch.cat([*pieces, tensor.new_empty(0)]), tensor.view(-1))
    assert fingerprint(checkpoint.digests) == identity.fingerprint(folder)


@pytest.mark.parametrize(
    ("shape", "rows"),
    [((3_000_000,), [1 << 20, 1 << 20, 902_848]), ((900, 3_000), [349, 349, 202]), ((2, 1_100_000), [1, 1])],
    ids=["a vector", "a matrix", "rows longer than a piece"],
)
def test_a_large_tensor_comes_and_goes_in_pieces_of_whole_rows(tmp_path: Path, shape: Any, rows: list[int]) -> None:
    large = torch.arange(math.prod(shape), dtype=torch.int32).view(shape)
    save_file({"large": large}, tmp_path / WEIGHTS)
    (tmp_path / "copy").mkdir()
    with Checkpoint(tmp_path) as checkpoint, ShardWriter(tmp_path / "copy", {"large": large.to("meta")}, "5GB", 1) as writer:
        pieces = list(checkpoint.chunks("large"))
        assert [len(piece) for piece in pieces] == rows
        assert torch.equal(torch.cat(pieces), large)
        writer.write("large", pieces)
        assert writer.digests == checkpoint.digests
        whole = checkpoint.digests["large"]
        checkpoint.read("large")
        assert checkpoint.digests["large"] == whole
        assert not writer.verify("large", "0" * 32)
        assert writer.verify("large", whole)


@settings(max_examples=40, deadline=None)
@given(
    entries=st.dictionaries(names, shapes, min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    backwards=st.booleans(),
)
def test_writes_the_bytes_of_safetensors_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, entries: dict[str, tuple[int, ...]], dtype: torch.dtype, backwards: bool
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    tensors = {name: random_tensor(shape, dtype, seed) for seed, (name, shape) in enumerate(entries.items())}
    save_file(tensors, folder / "theirs", metadata={"format": "pt"})
    with ShardWriter(folder, {name: t.to("meta") for name, t in tensors.items()}, "5GB", 1) as writer:
        for name in sorted(tensors, reverse=backwards):
            writer.write(name, [tensors[name]])
        writer.sync()
    assert (folder / WEIGHTS).read_bytes() == (folder / "theirs").read_bytes()
    assert writer.index is None and writer.files == {WEIGHTS: (folder / WEIGHTS).stat().st_size}
    assert fingerprint(writer.digests) == identity.fingerprint(folder)


def test_writes_into_what_an_interrupted_attempt_left(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3), "b": torch.zeros(2, 2)}
    (tmp_path / WEIGHTS).write_bytes(b"\xff" * 10_000)
    with ShardWriter(tmp_path, tensors, "5GB", 7) as writer:
        for name, tensor in tensors.items():
            writer.write(name, [tensor])
    assert same(load_file(tmp_path / WEIGHTS)["a"], tensors["a"])
    assert same(load_file(tmp_path / WEIGHTS)["b"], tensors["b"])


def test_a_tensor_of_another_size_than_laid_out_is_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, {"a": torch.ones(3)}, "5GB", 3) as writer, pytest.raises(WorkError, match="a has 8 bytes, 12"):
        writer.write("a", [torch.ones(2)])
    assert writer.digests == {}


@pytest.mark.parametrize("size", ["many", "5 apples", 0, -1])
def test_a_size_that_is_none(tmp_path: Path, size: Any) -> None:
    with pytest.raises(UsageError, match="is not a size such as '5GB'"):
        ShardWriter(tmp_path, {"a": torch.ones(3)}, size, 3)


def file_of(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def entry(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def entries(**tensors: Any) -> bytes:
    return file_of(json.dumps(tensors).encode(), bytes(8))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no whole safetensors file: it has 0 bytes, its header 0"),
        (b"\x08\0\0", "is no whole safetensors file: it has 3 bytes"),
        (file_of(b"{}", length=3), "it has 10 bytes, its header 3"),
        (file_of(b"{}", length=2**64 - 1), "its header 18446744073709551615"),
        (file_of(b"{not json"), "its header is not JSON"),
        (file_of(b"\xff\xfe{}"), "its header is not JSON"),
        (file_of(b"[" * 100_000), "its header is not JSON"),
        (file_of(b"[1]"), "its header is a list"),
        (entries(a=5), "a has the entry: 5"),
        (entries(a={"dtype": "F32"}), "a has the entry"),
        (entries(a=entry(offsets=[0])), "a has the entry"),
        (entries(a=entry(shape=3)), "a has the entry"),
        (entries(a=entry(dtype="F4")), "a is of dtype 'F4'; allowed: F64, "),
        (entries(a=entry(dtype=["F32"])), "a is of dtype ['F32']; allowed: "),
        (entries(a=entry(shape=[-2])), ": a has shape [-2]"),
        (entries(a=entry(shape=[2.0])), ": a has shape [2.0]"),
        (entries(a=entry(shape=[True, 2])), ": a has shape [True, 2]"),
        (entries(a=entry(offsets=[8, 0])), ": a has -8 bytes, F32 of shape [2] needs 8"),
        (entries(a=entry(shape=[3])), ": a has 8 bytes, F32 of shape [3] needs 12"),
        (entries(a=entry(offsets=[4, 12])), ": a begins at byte "),
        (entries(a=entry(shape=[4], offsets=[0, 16])), "is truncated, or its safetensors header corrupt: a ends at byte "),
        (entries(a=entry(shape=[10**15], offsets=[0, 4 * 10**15])), "is truncated, or its safetensors header corrupt: a ends at"),
        (entries(a=entry(shape=[1], offsets=[0, 4])), ": its tensors end at byte "),
        (entries(a=entry(), b=entry()), ": b begins at byte "),
    ],
)
def test_a_header_that_lies(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        Checkpoint(tmp_path)
    assert message in str(caught.value) and str(tmp_path / WEIGHTS) in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_file_is_read_as_it_is_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    file = tmp_path_factory.mktemp("shards") / WEIGHTS
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, file)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        tensors = read_header(file)
    except UsageError as error:
        assert str(file) in str(error)
    else:
        assert sum(tensor.nbytes for tensor in tensors) <= file.stat().st_size - 8


def two_shards(folder: Path, weight_map: Any) -> None:
    save_file({"a": torch.ones(2)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(2)}, folder / "model-00002-of-00002.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": FIRST, "b": "model-00003-of-00002.safetensors"}, "names model-00003-of-00002.safetensors, which is not there"),
        ({"a": FIRST, "b": "../b.safetensors"}, "names ../b.safetensors, which is not there"),
        ({"a": FIRST, "b": FIRST}, f"says that b is in {FIRST}, which does not hold it"),
        ({"a": FIRST, "b": SECOND, "c": SECOND}, f"says that c is in {SECOND}, which does not hold it"),
        ({"a": SECOND, "b": FIRST}, f"says that a is in {SECOND}, which does not hold it"),
        ({}, "weight_map must map tensors to files"),
        ([FIRST], "weight_map must map tensors to files"),
        ({"a": 1}, "weight_map must map tensors to files"),
    ],
)
def test_an_index_that_lies(tmp_path: Path, weight_map: Any, message: str) -> None:
    two_shards(tmp_path, weight_map)
    with pytest.raises(UsageError) as caught:
        Checkpoint(tmp_path)
    assert message in str(caught.value) and str(tmp_path / INDEX) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "7"])
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    two_shards(tmp_path, {})
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(UsageError, match="is no index"):
        Checkpoint(tmp_path)


def test_a_tensor_that_the_index_does_not_list_or_that_is_there_twice(tmp_path: Path) -> None:
    two_shards(tmp_path, {"a": FIRST, "b": SECOND})
    Checkpoint(tmp_path)
    save_file({"b": torch.ones(2), "c": torch.ones(1)}, tmp_path / SECOND)
    with pytest.raises(UsageError, match=f"does not list c, which is in {SECOND}"):
        Checkpoint(tmp_path)
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / SECOND)
    with pytest.raises(UsageError, match=f"a is in two shards, .*{FIRST} and {SECOND}"):
        Checkpoint(tmp_path)


def test_pickles_are_refused_with_the_command_that_converts_them(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UsageError) as caught:
        Checkpoint(tmp_path)
    assert "holds pickles (pytorch_model.bin), which are not read" in str(caught.value)
    assert f"M.from_pretrained('{tmp_path}', dtype='auto').save_pretrained('{tmp_path}-safetensors')\"" in str(caught.value)


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"holds neither {WEIGHTS} nor {INDEX}"):
        Checkpoint(tmp_path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1000)}, tmp_path / WEIGHTS)
    with Checkpoint(tmp_path) as checkpoint:
        with (tmp_path / WEIGHTS).open("r+b") as stream:
            stream.truncate(500)
        with pytest.raises(WorkError, match="became shorter while it was read: a is incomplete"):
            checkpoint.read("a")
    assert checkpoint.digests == {}
