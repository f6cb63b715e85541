"""What a command reads is never what it replaces: refused in one line, and everything stays as it was."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.disk import contents
from transformers import PreTrainedModel

from hf_gqaprune import PruningPlan
from hf_gqaprune.checkpoint import identity
from hf_gqaprune.cli import main
from hf_gqaprune.data.text import text_paths
from hf_gqaprune.utils import new_folder, write_text

TEXT = "the quick brown fox jumps over the lazy dog, and then it counts: one two three four five. " * 60
SIZES = ("--samples", "8", "--seq-len", "32")


@pytest.fixture
def place(tmp_path: Path, llama: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a model, a text, and `out`, a finished run that holds a model and a text of its own."""
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "model", tmp_path / "out" / "model"):
        llama.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "out" / "text.txt").write_text(TEXT)
    (tmp_path / "test.txt").write_text(TEXT[7:])
    (tmp_path / "out" / "run.json").write_text('{"begun": {}, "done": {}}')
    recipe = {
        "model": "model",
        "output": "out",
        "calibration": {"data": ["text.txt"], "samples": 8, "seq_len": 32},
        "prune": {"backbone_ratio": 0.3, "criterion": "magnitude", "compensation": "none"},
        "recover": None,
        "evaluate": {"data": ["test.txt"], "seq_len": 32},
    }
    for file in (tmp_path / "recipe.yaml", tmp_path / "out" / "mine.yaml"):
        file.write_text(yaml.safe_dump(recipe))
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], place: Path, line: list[str]) -> str:
    before = contents(place)
    assert main(line) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1, told
    assert contents(place) == before
    return told[0]


@pytest.mark.parametrize("flag", ["--overwrite", "--resume"])
@pytest.mark.parametrize(
    ("override", "lost"),
    [
        ("model=out/model", "out/model"),
        ("calibration.data=[text.txt, out/text.txt=0.5]", "out/text.txt"),
        ("evaluate.data=[out/text.txt]", "out/text.txt"),
        ("recover={data: [out/text.txt], seq_len: 32}", "out/text.txt"),
    ],
)
def test_a_run_keeps_what_its_recipe_reads(
    place: Path, capsys: pytest.CaptureFixture[str], flag: str, override: str, lost: str
) -> None:
    told = refused(capsys, place, ["run", "recipe.yaml", flag, "--set", override])
    assert f"{lost} is inside out and would be replaced" in told


def test_a_run_keeps_the_recipe_itself(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, place, ["run", "out/mine.yaml", "--overwrite"])
    assert "out/mine.yaml is inside out and would be replaced" in told
    # nothing of it goes where a run is resumed
    assert main(["run", "out/mine.yaml", "--resume"]) == 0
    assert (place / "out" / "mine.yaml").exists() and (place / "out" / "pruned").is_dir()


def test_weights_that_cannot_be_pruned_cost_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], llama: PreTrainedModel
) -> None:
    (place / "model" / "model.safetensors").unlink()
    torch.save(llama.state_dict(), place / "model" / "pytorch_model.bin")
    assert "safetensors" in refused(capsys, place, ["run", "recipe.yaml", "--overwrite"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["model", "-o", "model"], "model would be replaced by the output"),
        (["model", "-o", "."], "is a mounted disk or holds the current folder"),
        (["out/model", "-o", "out"], "out/model is inside out and would be replaced"),
        (["out/model", "-o", "out", "--memory", "2GiB"], "out/model is inside out and would be replaced"),
        (["model", "-o", "out", "--calibration", "out/text.txt"], "out/text.txt is inside out and would be replaced"),
    ],
)
def test_a_pruning_keeps_what_it_reads(
    place: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    text = [] if "--calibration" in flags else ["--calibration", "text.txt"]
    assert said in refused(capsys, place, ["prune", *flags, *text, *SIZES, "--backbone-ratio", "0.3", "--overwrite"])


def test_saved_plans_and_statistics_stay(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["plan", "model", "--backbone-ratio", "0.3", "--calibration", "text.txt", *SIZES, "-o", "out/plan.json"]
    assert main([*line, "--save-statistics", "out/statistics"]) == 0
    capsys.readouterr()
    for flags, lost in (
        (["--plan", "out/plan.json", "--compensation", "none"], "out/plan.json"),
        (["--backbone-ratio", "0.3", "--statistics", "out/statistics"], "out/statistics"),
    ):
        assert f"{lost} is inside out" in refused(capsys, place, ["prune", "model", *flags, "-o", "out", "--overwrite"])


def test_only_what_is_made_here_is_replaced(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["prune", "model", "--ratio", "0.3", "--criterion", "magnitude", "--compensation", "none", "--overwrite", "-o"]
    (place / "thesis").mkdir()
    (place / "thesis" / "chapter.tex").write_text("hard work")
    (place / "thesis" / "config.json").write_text('{"compiler": "lualatex"}')
    (place / "linked").symlink_to("elsewhere")
    for flags in ((), ("--memory", "2GiB")):
        for output, said in (
            ("thesis", "thesis is no checkpoint, adapter, "),
            ("thesis/chapter.tex", "thesis/chapter.tex is no checkpoint, adapter, "),
            ("linked", f"linked is a link, which a folder cannot replace: name {place}/elsewhere"),
            ("thesis/..", f"write out which folder is meant, {place}"),
        ):
            assert said in refused(capsys, place, [*line, output, *flags])
    for _ in range(2):
        assert main([*line, "pruned"]) == 0


@pytest.mark.parametrize("flags", [(), ("--memory", "2GiB")])
def test_statistics_are_kept_beside_what_they_are_for(
    place: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    line = ["prune", "model", "--ratio", "0.3", "--calibration", "text.txt", *SIZES, *flags, "-o", "pruned"]
    for kept in ("pruned", "pruned/statistics"):
        assert f"{kept}, would lie in the output pruned" in refused(capsys, place, [*line, "--save-statistics", kept])
    assert "give --save-statistics another name" in refused(capsys, place, [*line, "--save-statistics", "model"])


def test_what_was_left_goes_when_it_is_begun_anew_in_another_way(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["prune", "model", "--ratio", "0.3", "--criterion", "magnitude", "--compensation", "none", "-o", "pruned"]
    for name in (".pruned.measured", ".pruned.unfinished"):
        (place / name).mkdir()
        (place / name / "progress.json").write_text("{}")
    assert main([*line, "--overwrite"]) == 0
    assert not [path for path in place.iterdir() if path.name.startswith(".pruned")]


def test_a_plan_is_one_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["plan", "model", "--backbone-ratio", "0.3", "--criterion", "magnitude", "--overwrite", "-o"]
    (place / "empty").mkdir()
    for folder in ("out", "empty"):
        told = refused(capsys, place, [*line, folder])
        assert f"{folder} is a folder, and a plan is one file: name a file, such as {folder}/plan.json" in told
    assert "text.txt is a file" in refused(capsys, place, [*line, "text.txt/plan.json"])
    read = ["plan", "model", "--backbone-ratio", "0.3", "--calibration", "text.txt", *SIZES, "--overwrite"]
    assert "text.txt is no plan, report, recipe" in refused(capsys, place, [*read, "-o", "text.txt"])
    assert main([*line, "plans/of/mine.json"]) == 0
    assert PruningPlan.load(place / "plans" / "of" / "mine.json").criterion == "magnitude"


@pytest.mark.parametrize(
    ("flags", "lost"),
    [
        (["out/model", "--data", "text.txt"], "out/model is inside out"),
        (["model", "--data", "out/text.txt=2"], "out/text.txt is inside out"),
        (["model", "--data", "text.txt", "--teacher", "out/model"], "out/model is inside out"),
        (["model", "--data", "text.txt", "--evaluation", "out/text.txt"], "out/text.txt is inside out"),
        (["out.training/model", "--data", "text.txt"], "out.training/model is inside out.training"),
    ],
)
def test_a_recovery_keeps_what_it_reads(
    place: Path, capsys: pytest.CaptureFixture[str], flags: list[str], lost: str
) -> None:
    shutil.copytree(place / "model", place / "out.training" / "model")
    told = refused(capsys, place, ["recover", *flags, "--seq-len", "32", "-o", "out", "--overwrite"])
    assert f"{lost} and would be replaced" in told


def test_a_merge_keeps_adapter_and_base(place: Path, capsys: pytest.CaptureFixture[str], llama: PreTrainedModel) -> None:
    from peft import LoraConfig, get_peft_model

    adapter = place / "out" / "adapter"
    get_peft_model(llama, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(adapter)
    identity.write_identity(adapter, base_fingerprint=identity.fingerprint("model"))
    line = ["merge", "out/adapter", "--overwrite", "--base"]
    assert "out/adapter is inside out and would" in refused(capsys, place, [*line, "model", "-o", "out"])
    assert "out/model would be replaced by the output" in refused(capsys, place, [*line, "out/model", "-o", "out/model"])
    # beside the adapter's folder there is room
    assert main([*line, "model", "-o", "merged"]) == 0
    assert identity.read_identity("merged")["fingerprint"] == identity.fingerprint("model")


def test_paths_of_texts() -> None:
    assert text_paths(["books.txt=0.7", "wikitext2", "ORG/NAME:CONFIG", "a=b.txt"]) == [
        "books.txt", "wikitext2", "ORG/NAME", "a=b.txt",
    ]  # fmt: skip


def test_permissions_follow_the_umask_which_is_never_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", None)
            for _ in range(2):
                write_text(tmp_path / "file", "text")
                with new_folder(tmp_path / "folder", overwrite=True) as scratch:
                    write_text(scratch / "config.json", '{"model_type": "llama"}')
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"file": 0o640, "folder": 0o750, "config.json": 0o640}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "notes.txt"])
def test_overwrite_replaces_no_file_of_another_kind(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (dense / "notes.txt").write_text("{mine}")
    before = (dense / name).read_bytes()
    line = ["plan", str(dense), "--ratio", "0.2", "--criterion", "magnitude", "-o", str(dense / name), "--overwrite"]
    for command in (line, ["recipes", "cp", "demo", str(dense / name), "--overwrite"]):
        assert main(command) == 2
        assert f"{name} is no plan, report, recipe, card or GGUF file, so it is not replaced" in capsys.readouterr().err
        assert (dense / name).read_bytes() == before


def test_overwrite_replaces_what_was_written_before(dense: Path, tmp_path: Path) -> None:
    line = ["plan", str(dense), "--ratio", "0.2", "--criterion", "magnitude", "-o", str(tmp_path / "plan")]
    assert main(line) == 0 and main([*line, "--overwrite"]) == 0
    for name in ("demo", "llama-3-8b", "any-llama"):
        assert main(["recipes", "cp", name, str(tmp_path / "mine"), *([] if name == "demo" else ["--overwrite"])]) == 0
    (tmp_path / "empty").touch()
    assert main(["recipes", "cp", "demo", str(tmp_path / "empty"), "--overwrite"]) == 0
