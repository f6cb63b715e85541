"""What a checkpoint's weights have seen is known from its folder: kept by prune, recover and run, and never evaluated on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import hf_gqaprune as gp
from hf_gqaprune import UsageError, hub
from hf_gqaprune.checkpoint import identity, refuse_overlap
from hf_gqaprune.cli import main
from hf_gqaprune.data.text import load_text
from hf_gqaprune.evaluation import perplexity as evaluation
from hf_gqaprune.evaluation.report import Report

SIZES = ("--samples", "8", "--seq-len", "32")
TRAINING = "seq_len: 32, max_tokens: 1024, rank: 2, held_out_tokens: 96"


def story(words: str, count: int = 400) -> str:
    each = words.split()
    return " ".join(each[(i * i + i // 3) % len(each)] for i in range(count))


@pytest.fixture
def place(tmp_path: Path, llama: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a model, three texts, and a recipe that reads all of them."""
    monkeypatch.chdir(tmp_path)
    llama.save_pretrained("model")
    tokenizer.save_pretrained("model")
    for name, words in {"read": "the cat saw two dogs", "trained": "a bird by the old mill", "test": "we sing at night"}.items():
        Path(f"{name}.txt").write_text(story(words))
    recipe = {
        "model": "model",
        "output": "out",
        "calibration": {"data": ["read.txt"], "samples": 8, "seq_len": 32},
        "prune": {"backbone_ratio": 0.3, "compensation": "least_squares"},
        "recover": None,
        "evaluate": {"data": ["test.txt"], "seq_len": 32},
        "card": {"license": "mit"},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def stages_of(told: str) -> dict[str, str]:
    lines = (line.partition(": ") for line in told.splitlines())
    return {name: what for name, _, what in lines if what in ("working", "kept")}


def prune(output: str, *flags: str, model: str = "model", text: str = "read.txt") -> dict[str, Any]:
    line = ["prune", model, "--backbone-ratio", "0.3", "--calibration", text, *SIZES, "-o", output, *flags]
    assert main(line) == 0
    known = identity.read_identity(output)
    assert known is not None
    return known


def test_prune_notes_text_seed_and_compensation(place: Path) -> None:
    known = prune("pruned", "--seed", "3", "--compensation", "least_squares", "--save-statistics", "statistics")
    sha256 = load_text("read.txt", split="train").sha256
    source = {"name": "read", "split": "file", "sha256": sha256, "windows": 8, "weight": 1.0}
    assert (known["calibration"], known["seed"], known["compensation"]) == ([source], 3, "least_squares")
    # saved statistics say what they were measured on
    line = ["prune", "model", "--backbone-ratio", "0.3", "--statistics", "statistics", "-o", "again"]
    assert main([*line, "--memory", "2GiB"]) == 0
    assert identity.read_identity("again")["calibration"] == [source]
    assert prune("bare", "--criterion", "magnitude", "--compensation", "none")["calibration"] == []
    # what is pruned once more has seen both texts
    assert [s["name"] for s in prune("twice", model="pruned", text="trained.txt")["calibration"]] == ["read", "trained"]
    assert not [v for f in ("pruned", "twice") for v in hub._strings(identity.read_identity(f)) if hub._is_local_path(v[1])]


def test_a_resumed_run_sees_that_text_or_weights_are_others(
    place: Path, capsys: pytest.CaptureFixture[str], llama: PreTrainedModel
) -> None:
    recovery = f"recover={{data: [trained.txt], {TRAINING}}}"

    def resumed() -> dict[str, str]:
        assert main(["run", "recipe.yaml", "--resume", "--set", recovery]) == 0
        return stages_of(capsys.readouterr().out)

    names = ("pruned", "recovered", "report.json")
    assert resumed() == dict.fromkeys(names, "working")
    assert resumed() == dict.fromkeys(names, "kept")
    Path("test.txt").write_text(story("we sing at dawn"))
    assert resumed() == {"pruned": "kept", "recovered": "kept", "report.json": "working"}
    Path("trained.txt").write_text(story("a bird by the new mill"))
    assert resumed() == {"pruned": "kept", "recovered": "working", "report.json": "working"}
    Path("read.txt").write_text(story("the cat saw two birds"))
    assert resumed() == dict.fromkeys(names, "working")
    assert Report.load("out/report.json").calibration[0]["sha256"] == load_text("read.txt", split="train").sha256
    for weight in llama.parameters():
        weight.data.mul_(1.01)
    llama.save_pretrained("model")
    assert resumed() == dict.fromkeys(names, "working")
    # the texts change places: what was calibrated on would be evaluated on
    os.rename("read.txt", "other.txt")
    os.rename("test.txt", "read.txt")
    os.rename("other.txt", "test.txt")
    assert resumed()["pruned"] == "working"
    assert main(["run", "recipe.yaml", "--resume", "--set", "evaluate.data=[read.txt]"]) == 2
    assert "same text" in capsys.readouterr().err


def test_a_run_on_a_checkpoint_knows_what_made_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prune("pruned", text="test.txt")
    capsys.readouterr()
    assert main(["run", "recipe.yaml", "--set", "model=pruned"]) == 2
    assert "test (file) is evaluated on, but test (file) is the same text" in capsys.readouterr().err
    assert not Path("out").exists()


def test_step_by_step_makes_the_report_of_a_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "recipe.yaml", "--set", f"recover={{data: [trained.txt], {TRAINING}}}"]) == 0
    prune("pruned", "--compensation", "least_squares")
    pairs = (setting.split(": ") for setting in TRAINING.split(", "))
    settings = [word for key, value in pairs for word in (f"--{key.replace('_', '-')}", value)]
    assert main(["recover", "pruned", "--data", "trained.txt", *settings, "-o", "recovered"]) == 0
    capsys.readouterr()
    line = ["eval", "model", "pruned", "recovered", "--data", "test.txt", "--seq-len", "32", "--report"]
    assert main(line) == 0
    told = capsys.readouterr().out
    assert Path("recovered/report.json").read_bytes() == Path("out/report.json").read_bytes()
    assert Path("recovered/report.png").is_file()
    assert Report.load("recovered/report.json").table() in told and "recovered/report.json" in told
    assert main(line) == 2
    assert "report.json exists already" in capsys.readouterr().err
    assert main([*line, "--overwrite", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"model", "pruned", "recovered"}
    for stages, names in ((("model", "pruned"), ["dense", "pruned"]), (("model", "recovered"), ["dense", "recovered"])):
        assert main(["eval", *stages, "--data", "test.txt", "--report", "--overwrite"]) == 0
        report = Report.load(Path(stages[-1]) / "report.json")
        assert [stage.name for stage in report.stages] == names and report.model == "model"
    assert report.stages[1].trainable == json.loads(Path("recovered/training_log.json").read_text())["trainable"]


def refused(capsys: pytest.CaptureFixture[str], *line: str) -> str:
    assert main(list(line)) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1, told
    return told[0]


def test_reports_that_make_no_sense(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "other"):
        prune(name, "--criterion", "magnitude", *(("--round-to", "4") if name == "other" else ()))
    capsys.readouterr()
    end = ("--data", "test.txt", "--report")
    assert "name two or three checkpoints" in refused(capsys, "eval", "model", *end)
    assert "name two or three checkpoints" in refused(capsys, "eval", "model", "one", "other", "demo", *end)
    assert "model has no prune_plan.json" in refused(capsys, "eval", "one", "model", *end)
    assert "demo is not a local folder" in refused(capsys, "eval", "model", "demo", *end)
    assert "different plans" in refused(capsys, "eval", "model", "one", "other", *end)
    assert "add --report" in refused(capsys, "eval", "model", "one", "--data", "test.txt", "--overwrite")
    log = {"trainable": 1, "data": [{"name": "x", "split": "file", "sha256": load_text("trained.txt", split="test").sha256}]}
    Path("one/training_log.json").write_text(json.dumps(log))
    for text, what in (("read.txt", "read (file)"), ("trained.txt", "x (file)")):
        told = refused(capsys, "eval", "model", "one", "--data", text, "--max-chars", "900", "--report")
        assert f"but {what} is the same text and was calibrated or trained on" in told
    prune("three", "--criterion", "magnitude")
    capsys.readouterr()
    assert "give the recovered checkpoint last" in refused(capsys, "eval", "model", "one", "three", *end)
    Path("twin").mkdir()
    Path("twin/test.txt").write_text("another")
    told = refused(capsys, "eval", "model", "three", "--data", "test.txt", "twin/test.txt", "--report")
    assert "two evaluation texts are called 'test'" in told
    assert not list(Path().glob("*/report.*"))


def test_a_checkpoint_that_tells_little_is_reported_all_the_same(
    place: Path, tokenizer: Any, llama: PreTrainedModel
) -> None:
    plan = gp.make_plan(model=llama, backbone_ratio=0.3, criterion="magnitude")
    gp.prune(llama, plan, compensation="none").save_pretrained("saved")
    tokenizer.save_pretrained("saved")
    assert main(["eval", "model", "saved", "--data", "test.txt", "--seq-len", "32", "--report"]) == 0
    report = Report.load("saved/report.json")
    assert report.seed is None and report.calibration == () and report.plan["hash"] == plan.hash()
    assert main(["card", "saved", "--base-model", "acme/tiny", "--license", "mit", "--name", "acme/small"]) == 0
    card = Path("saved/README.md").read_text()
    assert "| | dense | pruned | pruned / dense |" in card and "seed" not in card
    assert main(["push", "saved", "acme/small", "--dry-run"]) == 0


def test_the_card_of_a_recovery_needs_no_report(place: Path) -> None:
    prune("pruned")
    pairs = (setting.split(": ") for setting in TRAINING.split(", "))
    settings = [word for key, value in pairs for word in (f"--{key.replace('_', '-')}", value)]
    assert main(["recover", "pruned", "--data", "trained.txt", *settings, "-o", "recovered"]) == 0
    assert main(["card", "recovered", "--base-model", "model", "--license", "mit", "--name", "acme/small"]) == 0
    card = Path("recovered/README.md").read_text()
    log = json.loads(Path("recovered/training_log.json").read_text())
    assert "then recovered by training." in card and "Nothing was evaluated" not in card
    assert f"Recovery trained {log['trainable']:,} parameters on {log['tokens']:,} tokens, merged" in card
    assert f"\n- trained (split file, sha256 {load_text('trained.txt', split='train').sha256}, rows " in card
    assert f"\n- read (split file, sha256 {load_text('read.txt', split='train').sha256}, windows 8)" in card
    first, last = log["held_out"][0]["perplexity"], log["kept"]["perplexity"]
    assert f"perplexity was {first:,.2f} before the training and {last:,.2f} after it" in card
    assert "compensation `natural_gradient`" in card and str(place) not in card
    assert main(["push", "recovered", "acme/small", "--dry-run"]) == 0


def test_all_checkpoints_are_measured_on_the_same_tokens(
    place: Path, capsys: pytest.CaptureFixture[str], tokenizer: Any, llama: PreTrainedModel
) -> None:
    config = {**llama.config.to_dict(), "max_position_embeddings": 48}
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained("short")
    # checked before the first model is measured
    assert "short holds no tokenizer" in refused(capsys, "eval", "model", "short", "--data", "test.txt")
    assert capsys.readouterr().out == ""
    tokenizer.save_pretrained("short")
    assert main(["eval", "model", "short", "--data", "test.txt", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {each["perplexity"][0]["seq_len"] for each in found.values()} == {48}
    assert main(["eval", "model", "--data", "test.txt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["perplexity"][0]["seq_len"] == 128
    # the same letters, other numbers
    whole = json.loads(Path("short/tokenizer.json").read_text())
    vocabulary = whole["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    Path("short/tokenizer.json").write_text(json.dumps(whole))
    told = refused(capsys, "eval", "model", "short", "--data", "test.txt")
    assert "tokens for model" in told and "cannot be compared" in told
    assert main(["eval", "demo", "model", "--data", "test.txt"]) == 2


def test_a_run_out_of_memory_names_what_a_recipe_can_change(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No CPU has a memory of its own that is full: the error of a GPU is raised where it would be."""
    import torch

    from hf_gqaprune.evaluation import compare as measuring
    from hf_gqaprune.pipeline import bounded
    from hf_gqaprune.pipeline import prune as pipeline

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "prune", full)
        assert main(["run", "recipe.yaml"]) == 1
        told = capsys.readouterr().err
        assert "is full (CUDA out of memory): --set prune.memory=SIZE" in told and " --memory" not in told
        # prune itself has these flags
        assert main(["prune", "model", "--ratio", "0.2", "--calibration", "read.txt", *SIZES, "-o", "pruned"]) == 1
        assert "--memory SIZE" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        patched.setattr(bounded, "prune_checkpoint", full)
        assert main(["run", "recipe.yaml", "--resume", "--set", "prune.memory=2GiB"]) == 1
        told = capsys.readouterr().err
        assert "is full (CUDA out of memory): --set prune.memory=SIZE" in told and " --memory" not in told
    with monkeypatch.context() as patched:
        patched.setattr(measuring, "evaluate_perplexity", full)
        assert main(["run", "recipe.yaml", "--resume"]) == 1
        told = capsys.readouterr().err
        assert "is full (CUDA out of memory): finished stages are kept for --resume" in told and "--device" not in told
    assert main(["run", "recipe.yaml", "--resume"]) == 0
    assert stages_of(capsys.readouterr().out) == {"pruned": "kept", "report.json": "working"}
    assert evaluation.evaluate_perplexity is measuring.evaluate_perplexity


def test_two_files_of_one_name_are_two_texts() -> None:
    texts = [{"name": "notes", "split": "file", "sha256": sha} for sha in "ab"]
    refuse_overlap(texts[:1], texts[1:])
    with pytest.raises(UsageError, match="is the same text"):
        refuse_overlap(texts, texts[1:])
