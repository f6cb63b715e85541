"""Names, files and datasets become one text each; what cannot be loaded is refused in one line."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from support.hub_server import Blob, HubServer, Repo

from hf_gqaprune.data import demo
from hf_gqaprune.data.text import WIKITEXT2, Text, load_text
from hf_gqaprune.errors import UsageError


def dataset(folder: Path, **columns: list[object]) -> Path:
    """A local dataset folder with `columns` as its train and test split; the test split is reversed."""
    folder.mkdir()
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    for split, content in (("train", rows), ("test", rows[::-1])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


def parquet(**columns: list[str]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def test_a_file_is_its_own_split(tmp_path: Path) -> None:
    (tmp_path / "notes.test.txt").write_text("één\ntwo\n", encoding="utf-8")
    text = load_text(str(tmp_path / "notes.test.txt"), split="train")
    assert text == Text("notes.test", "file", "één\ntwo\n")
    assert text.sha256 == hashlib.sha256("één\ntwo\n".encode()).hexdigest()


def test_max_chars_counts_characters(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ééé", encoding="utf-8")
    assert load_text(str(tmp_path / "a.txt"), split="test", max_chars=2).content == "éé"


@pytest.mark.parametrize("split", ["train", "test"])
def test_demo_is_the_embedded_text(split: str) -> None:
    assert load_text("demo", split=split) == Text("demo", split, demo.demo_text(split))


def test_a_local_dataset_folder(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "letters", text=["one", "two"], label=[0, 1])
    assert load_text(str(folder), split="train") == Text("letters", "train", "one\n\ntwo")
    assert load_text(str(folder), split="test") == Text("letters", "test", "two\n\none")


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "parquet"])
def test_a_table_is_a_file_whose_column_text_is_read(tmp_path: Path, ending: str) -> None:
    table = datasets.Dataset.from_dict({"label": [0, 1], "text": ["one", "two"]})
    path = tmp_path / f"rows.{ending}"
    {"json": table.to_json, "jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[ending](path)
    assert load_text(str(path), split="test") == Text("rows", "file", "one\n\ntwo")


def test_a_table_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "one"')
    with pytest.raises(UsageError, match=r"cannot read .*rows\.jsonl: ."):
        load_text(str(tmp_path / "rows.jsonl"), split="test")
    (tmp_path / "pairs.csv").write_text("question,answer\na,b\n")
    with pytest.raises(UsageError, match=r"pairs\.csv has no column 'text'; it has: question, answer"):
        load_text(str(tmp_path / "pairs.csv"), split="test")


def test_folders_that_datasets_saved(tmp_path: Path) -> None:
    one = datasets.Dataset.from_dict({"text": ["one", "two"]})
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one}).save_to_disk(tmp_path / "split")
    assert load_text(str(tmp_path / "one"), split="test") == Text("one", "test", "one\n\ntwo")
    assert load_text(str(tmp_path / "split"), split="train") == Text("split", "train", "one\n\ntwo")
    with pytest.raises(UsageError, match="split has no split 'test'; it has: train"):
        load_text(str(tmp_path / "split"), split="test")


def test_line_ends_are_kept(tmp_path: Path) -> None:
    (tmp_path / "dos.txt").write_bytes(b"one\r\ntwo\r\n")
    text = load_text(str(tmp_path / "dos.txt"), split="test")
    assert text.sha256 == hashlib.sha256(b"one\r\ntwo\r\n").hexdigest()


def test_a_dataset_without_text_lists_its_columns(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "pairs", question=["a"], answer=["b"])
    with pytest.raises(UsageError, match="has no column 'text'; it has: question, answer"):
        load_text(str(folder), split="train")


def test_a_column_that_is_not_text_is_refused(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "numbers", text=[1, 2])
    with pytest.raises(UsageError, match="column 'text' of .*numbers does not hold text"):
        load_text(str(folder), split="train")


def test_a_split_that_a_dataset_lacks_is_refused(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "letters", text=["one"])
    (folder / "test.jsonl").unlink()
    with pytest.raises(UsageError, match="cannot load split 'test' of .*letters: Unknown split"):
        load_text(str(folder), split="test")


def test_wikitext2_joins_its_lines_by_blank_lines(hub: HubServer) -> None:
    path, config = WIKITEXT2
    lines = ["", " = Title = \n", " A sentence . \n"]
    card = (
        f"---\nconfigs:\n- config_name: {config}\n  data_files:\n  - split: test\n    path: test-*\n---\n"
    ).encode()
    repo = hub.repos[f"datasets/{path}"] = Repo(private=False)
    files = {"README.md": Blob(card, False), "test-00000-of-00001.parquet": Blob(parquet(text=lines), True)}
    repo.commit("main", files, "first")
    assert load_text("wikitext2", split="test") == Text("wikitext2", "test", "\n\n".join(lines))
    by_id = f"{path}:{config}"
    assert load_text(by_id, split="test") == Text(by_id, "test", "\n\n".join(lines))


@pytest.mark.parametrize("source", ["ptb", "nobody/nothing", "nobody/nothing:config"])
def test_an_absent_dataset_says_that_a_file_can_be_given(hub: HubServer, source: str) -> None:
    message = f"cannot load split 'test' of {source}: .*; a text file can be given instead: --data FILE"
    with pytest.raises(UsageError, match=message):
        load_text(source, split="test")
    with pytest.raises(UsageError, match="a text file can be given instead: --calibration FILE"):
        load_text(source, split="train")


def test_an_unreachable_hub_says_that_a_file_can_be_given(hub: HubServer) -> None:
    hub.outage = ("ptb_text_only", 0)
    with pytest.raises(UsageError, match="cannot load split 'test' of ptb: .*; a text file can be given instead"):
        load_text("ptb", split="test")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "wikitxt2",
            r"unknown text 'wikitxt2' \(did you mean 'wikitext2'\?\); allowed: wikitext2, ptb, demo, a text file",
        ),
        ("notes.txt", "no such file or folder: notes.txt"),
        ("data/notes.txt", "no such file or folder: data/notes.txt"),
        ("/a/b/c", "no such file or folder: /a/b/c"),
        ("", "unknown text ''"),
    ],
)
def test_names_that_are_nothing(source: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_text(source, split="test")


@pytest.mark.parametrize("content", [b"", b" \n\t\n"])
def test_empty_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "empty.txt").write_bytes(content)
    with pytest.raises(UsageError, match=r"the text .*empty\.txt is empty"):
        load_text(str(tmp_path / "empty.txt"), split="test")


def test_bytes_that_are_not_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match=r"latin\.txt is not UTF-8 text: .* at byte 3"):
        load_text(str(tmp_path / "latin.txt"), split="test")


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="max_chars=0 must be at least 1"):
        load_text("demo", split="test", max_chars=0)
    with pytest.raises(UsageError, match=r"unknown split 'tset' \(did you mean 'test'\?\); allowed: train, test"):
        load_text("demo", split="tset")
