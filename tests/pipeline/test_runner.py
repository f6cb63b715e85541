"""`gqaprune run`: every stage leaves its result, a second run keeps what is unchanged, nothing starts that cannot end."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_gqaprune as gp
from hf_gqaprune import hub
from hf_gqaprune.checkpoint import identity
from hf_gqaprune.cli import main
from hf_gqaprune.model_cards.licenses import LLAMA, derived_name
from hf_gqaprune.pipeline import runner as pipeline

NUMBERS = "one two three four five six seven eight nine ten".split()


def counting(start: int) -> str:
    return " ".join(f"{NUMBERS[i % 10]} comes before {NUMBERS[(i + 1) % 10]}." for i in range(start, start + 120))


@pytest.fixture
def recipe(tmp_path: Path, llama, tokenizer) -> Path:
    """A recipe for a tiny model on two text files, without recovery."""
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "train.txt").write_text(counting(0))
    (tmp_path / "test.txt").write_text(counting(3) + " The end.")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model": str(tmp_path / "model"),
                "output": str(tmp_path / "out"),
                "calibration": {"data": [str(tmp_path / "train.txt")], "samples": 16, "seq_len": 32},
                "prune": {"backbone_ratio": 0.3},
                "recover": None,
                "evaluate": {"data": [str(tmp_path / "test.txt")], "seq_len": 32},
                "card": {"name": "Tiny-Llama-pruned", "license": "apache-2.0"},
            }
        )
    )
    return path


def stages_of(told: str) -> dict[str, str]:
    lines = (line.partition(": ") for line in told.splitlines())
    return {name: what for name, _, what in lines if what in ("working", "kept")}


def test_the_whole_way_and_back(capsys, tmp_path, recipe):
    recovery = f"recover={{data: [{tmp_path}/train.txt], seq_len: 32, max_tokens: 1024, rank: 2}}"
    assert main(["run", str(recipe), "--set", recovery]) == 0
    told = capsys.readouterr().out
    assert stages_of(told) == {"pruned": "working", "recovered": "working", "report.json": "working"}
    out = tmp_path / "out"
    report = json.loads((out / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["dense", "pruned", "recovered"]
    plan = gp.PruningPlan.load(out / "plan.json")
    assert [stage["parameters"] for stage in report["stages"]] == [
        plan.before.parameters, plan.after.parameters, plan.after.parameters,
    ]  # fmt: skip
    assert {"model", "stages", "plan", "versions", "seed"} <= set(report)
    measured = [stage["perplexity"]["test"] for stage in report["stages"]]
    assert set(measured[0]) == {"value", "nats", "tokens", "split", "seq_len", "stride", "bos", "text_sha256"}
    assert len({(m["tokens"], m["text_sha256"], m["seq_len"], m["stride"], m["bos"]) for m in measured}) == 1
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "model")
    again = gp.evaluate_perplexity(dense, tokens, str(tmp_path / "test.txt"), seq_len=32)
    assert (again.nats, again.tokens) == (measured[0]["nats"], measured[0]["tokens"])
    assert report["stages"][2]["trainable"] > 0
    published = {path.name for path in (out / "recovered").iterdir()}
    assert {"README.md", "report.json", "report.png", "recipe.yaml", "prune_plan.json", "tokenizer.json"} <= published
    sent = [name for name, _ in hub.bundle(out / "recovered").files]
    assert [name for name in sent if str(tmp_path).encode() in (out / "recovered" / name).read_bytes()] == []

    scope: dict[str, object] = {}
    exec(told.strip().splitlines()[-1], scope)  # the line it ends with loads the result
    loaded = scope["model"]
    assert isinstance(loaded, gp.PrunedLlamaForCausalLM)
    assert sum(weight.numel() for weight in loaded.parameters()) == plan.after.parameters

    before = identity.fingerprint(out / "recovered")
    changed = ["--resume", "--set", recovery, "--set", "evaluate.seq_len=64"]
    assert main(["run", str(recipe), *changed]) == 0
    told = capsys.readouterr().out
    assert stages_of(told) == {"pruned": "kept", "recovered": "kept", "report.json": "working"}
    assert identity.fingerprint(out / "recovered") == before
    report = json.loads((out / "recovered" / "report.json").read_text())
    assert {stage["perplexity"]["test"]["seq_len"] for stage in report["stages"]} == {64}


def test_a_name_that_the_licence_forbids_is_refused_before_any_work(capsys, tmp_path, recipe):
    named = ["--set", "card.name=acme/Small-Llama-3", "--set", "card.license=llama3"]
    assert main(["run", str(recipe), *named]) == 2
    told = "Meta Llama 3 Community License: the name 'Small-Llama-3' must begin with 'Llama-3'"
    assert told in capsys.readouterr().err and not (tmp_path / "out").exists()
    terms = LLAMA["llama3"]
    assert terms.objection(derived_name("meta-llama/Meta-Llama-3-8B")) is None
    assert derived_name("Llama-3.2-1B") == "Llama-3.2-1B-pruned"


def test_a_recipe_may_give_every_layer_its_rate(capsys, tmp_path, recipe):
    changes = ("rates=[0.5, 0.25, 0]", "criterion=magnitude", "compensation=none", "device=cpu")
    assert main(["run", str(recipe), *(word for change in changes for word in ("--set", f"prune.{change}"))]) == 0
    plan = gp.PruningPlan.load(tmp_path / "out" / "plan.json")
    assert [len(layer.kv_groups) for layer in plan.layers] == [2, 3, 4]


def test_what_a_run_says_of_publishing_works(capsys, tmp_path, recipe):
    assert main(["run", str(recipe), "--set", "prune.criterion=magnitude", "--set", "prune.compensation=none"]) == 0
    commands = re.findall(r"`(gqaprune [^`]+)`", capsys.readouterr().out)
    rename, send = ([word.replace("ORG/NAME", "acme/Tiny") for word in shlex.split(line)[1:]] for line in commands)
    assert main([*send, "--dry-run"]) == 2
    assert "loads the model from 'Tiny-Llama-pruned', not from acme/Tiny: run `gqaprune card" in capsys.readouterr().err
    assert main(rename) == 0 and main([*send, "--dry-run"]) == 0
    assert "license: apache-2.0" in (tmp_path / "out" / "pruned" / "README.md").read_text()
    capsys.readouterr()
    # a recipe that names the repository needs no second card
    assert main(["run", str(recipe), "--overwrite", "--set", "card.name=acme/Tiny"]) == 0
    (send,) = re.findall(r"`gqaprune ([^`]+)`", capsys.readouterr().out)
    assert send.endswith(" acme/Tiny") and main([*send.split(), "--dry-run"]) == 0


def test_one_seed_is_one_result(capsys, tmp_path, recipe):
    assert main(["run", str(recipe)]) == 0
    assert main(["run", str(recipe), "--set", f"output={tmp_path}/again"]) == 0
    assert (tmp_path / "out" / "plan.json").read_bytes() == (tmp_path / "again" / "plan.json").read_bytes()
    assert identity.fingerprint(tmp_path / "out" / "pruned") == identity.fingerprint(tmp_path / "again" / "pruned")
    capsys.readouterr()
    assert main(["run", str(recipe), "--resume"]) == 0
    assert stages_of(capsys.readouterr().out) == {"pruned": "kept", "report.json": "kept"}
    assert main(["run", str(recipe), "--resume", "--set", "prune.backbone_ratio=0.4"]) == 0
    assert stages_of(capsys.readouterr().out) == {"pruned": "working", "report.json": "working"}
    plan = gp.PruningPlan.load(tmp_path / "out" / "plan.json")
    assert plan.backbone_ratio == pytest.approx(0.4, abs=0.01)


def test_two_runs_do_not_write_into_one_folder(capsys, tmp_path, recipe, monkeypatch):
    real = pipeline._report

    def report(*args):
        for flag in ("--resume", "--overwrite"):
            before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
            assert main(["run", str(recipe), flag, "--set", "seed=1"]) == 2
            assert "another process works in" in capsys.readouterr().err
            assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        real(*args)

    monkeypatch.setattr(pipeline, "_report", report)
    assert main(["run", str(recipe)]) == 0
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_finished_run_is_replaced_only_by_one_that_makes_sense(capsys, tmp_path, recipe):
    assert main(["run", str(recipe)]) == 0
    files = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert main(["run", str(recipe)]) == 2
    assert main(["run", str(recipe), "--overwrite", "--set", "prune.criterion=tailor"]) == 2
    assert files == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert main(["run", str(recipe), "--overwrite", "--set", "seed=1"]) == 0
    told = capsys.readouterr()
    assert "exists already" in told.err and "'taylor'" in told.err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    (tmp_path / "mine" / "recipe.yaml").write_text("a recipe that someone wrote")
    for flag in ("--overwrite", "--resume"):
        assert main(["run", str(recipe), flag, "--set", f"output={tmp_path}/mine"]) == 2
        assert "not the output of a run" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"file", "recipe.yaml"}


def test_a_finished_run_stays_until_the_new_one_is_complete(capsys, tmp_path, recipe, monkeypatch):
    def files():
        return {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}

    def interrupted(*_):
        raise KeyboardInterrupt

    quick = ["--set", "prune.criterion=magnitude", "--set", "prune.compensation=none"]
    assert main(["run", str(recipe), *quick]) == 0
    before = files()
    other = [*quick, "--set", "prune.backbone_ratio=0.4"]
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "_report", interrupted)
        assert main(["run", str(recipe), "--overwrite", *other]) == 1
    assert files() == before
    capsys.readouterr()
    assert main(["run", str(recipe), "--resume", *other]) == 0
    assert stages_of(capsys.readouterr().out) == {"pruned": "kept", "report.json": "working"}
    assert gp.PruningPlan.load(tmp_path / "out" / "plan.json").backbone_ratio == pytest.approx(0.4, abs=0.01)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "override, said",
    [
        ("prune.backbone_ratio=0", "backbone_ratio=0"),
        ("prune.backbone_ratio=-1", "backbone_ratio=-1"),
        ("prune.backbone_ratio=0.99", "at most"),
        ("prune.allocation=globl", "'global'"),
        ("model=./gone", "./gone"),
        ("calibration.seq_len=4096", "128 positions"),
        ("calibration.samples=0", "from 1"),
        ("evaluate.data=gone.txt", "gone.txt"),
        ("evaluate.data=[{train}]", "same text"),
        ("evaluate.seq_len=4096", "from 2 to 128"),
        ("recover={{data: [gone.txt]}}", "gone.txt"),
        ("recover={{data: [{short}]}}", "fewer than one window"),
        ("recover={{data: [{train}], preset: defalt}}", "'default'"),
        ("recover={{data: [{train}], seq_len: 32, rank: 0}}", "rank=0 must be a whole number from 1"),
        ("recover={{data: [{test}], seq_len: 32}}", "will be evaluated on"),
    ],
)
def test_what_could_not_end_does_not_start(capsys, tmp_path, recipe, override, said):
    (tmp_path / "short.txt").write_text("one")
    places = {name: tmp_path / f"{name}.txt" for name in ("train", "test", "short")}
    assert main(["run", str(recipe), "--set", override.format(**places)]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and said in told[0]
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_a_run_computes_what_the_pruned_model_does(tmp_path, recipe, capsys):
    assert main(["run", str(recipe), "--set", "prune.compensation=none", "--set", "prune.criterion=magnitude"]) == 0
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    plan = gp.PruningPlan.load(tmp_path / "out" / "plan.json")
    ids = torch.arange(5, 40)[None]
    expected = gp.prune(dense, plan, compensation="none")(ids).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "pruned")(ids).logits, expected)


def test_a_pruned_model_is_pruned_again(tmp_path, recipe):
    assert main(["run", str(recipe)]) == 0
    first, second = tmp_path / "out" / "pruned", tmp_path / "again" / "pruned"
    assert main(["run", str(recipe), "--set", f"model={first}", "--set", f"output={second.parent}"]) == 0
    steps = [gp.PruningPlan.load(folder.parent / "plan.json") for folder in (first, second)]
    whole = gp.PruningPlan.load(second / "prune_plan.json")
    assert whole == steps[0].compose(steps[1])
    assert identity.read_identity(second)["plan_hash"] == whole.hash()
    assert identity.read_identity(second)["base_fingerprint"] == identity.fingerprint(first)
    report = json.loads((second.parent / "report.json").read_text())
    assert report["plan"]["hash"] == whole.hash()
    assert [stage["parameters"] for stage in report["stages"]] == [cost.parameters for cost in (steps[1].before, whole.after)]


def test_two_evaluation_texts_of_one_name_are_refused(capsys, tmp_path, recipe):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "test.txt").write_text(counting(5))
    both = f"evaluate.data=[{tmp_path}/test.txt, {tmp_path}/other/test.txt]"
    assert main(["run", str(recipe), "--set", both]) == 2
    assert "two evaluation texts are called 'test'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
