"""The command line as a user meets it: what is refused, in one line and before any work, and what each verb does."""

from __future__ import annotations

import json
import re
import signal
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, MistralConfig

import hf_gqaprune as gp
from hf_gqaprune.checkpoint import identity
from hf_gqaprune.cli import main
from hf_gqaprune.configuration import PruneRequest, PruningConfig, RecoveryConfig

TEXT = "the quick brown fox jumps over the lazy dog, and then it counts: one two three four five. " * 60


@pytest.fixture
def model(tmp_path: Path, llama, tokenizer) -> Path:
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def refused(capsys: pytest.CaptureFixture[str], *line: object) -> str:
    """Run a command that must be refused; return its one line."""
    capsys.readouterr()
    assert main([str(word) for word in line]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1, told
    assert told[0].startswith("gqaprune: ")
    return told[0]


@pytest.mark.parametrize("ratio", ["0", "1", "-1", "abc", "nan"])
def test_a_ratio_that_is_none(capsys, tmp_path, model, ratio):
    value = repr(ratio) if ratio == "abc" else f"ratio={float(ratio)}"
    assert value in refused(capsys, "plan", model, f"--ratio={ratio}", "-o", tmp_path / "plan.json")
    assert not (tmp_path / "plan.json").exists()


def test_a_ratio_above_what_is_possible(capsys, tmp_path, model, text):
    told = refused(capsys, "prune", model, "--ratio", "0.95", "--calibration", text, "-o", tmp_path / "out")
    assert "ratio=0.95" in told and "at most" in told and "--min-kv-heads" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--criterion", "tailor"], "'tailor' (did you mean 'taylor'?)"),
        (["--allocation", "globl"], "'globl' (did you mean 'global'?)"),
        (["--allocation", "uniform", "--temperature", "2"], "a setting of allocation layer_importance, not of uniform"),
        (["--allocation", "layer_importance", "--temperature", "0"], "temperature=0.0 must be a number from 0.01"),
        (["--attention-share", "1.5"], "attention_share=1.5 must be a number from 0 to 1"),
        (["--keep-layers", "0,3"], "keep_layers names layer 3, the model has 3: give numbers from -3 to 2"),
        (["--keep-layers", "0,last"], "'0,last' is not a list of values separated by commas: 'last' is not a whole number"),
        (["--keep-layers", "0,1,2"], "layers 0, 1, 2 kept"),
        (["--round-to", "64"], "round_to=64"),
        (["--round-to", "0"], "round_to=0 must be a whole number from 1"),
        (["--compensation", "least_square"], "did you mean 'least_squares'"),
        (["--samples", "100000"], "100000 are asked for"),
        (["--seq-len", "4096"], "128 positions"),
        (["--frobnicate"], "--frobnicate"),
        (["--calibration", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_choices_that_do_not_exist(capsys, tmp_path, model, text, flags, said):
    line = ["prune", model, "--backbone-ratio", "0.3", "--calibration", text, "--samples", "8", "--seq-len", "32"]
    assert said in refused(capsys, *line, "-o", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content, said", [("", "is empty"), ("  \n", "is empty"), ("short", "fewer than one window")])
def test_text_that_is_too_little(capsys, tmp_path, model, content, said):
    path = tmp_path / "little.txt"
    path.write_text(content)
    assert said in refused(capsys, "prune", model, "--ratio", "0.2", "--calibration", path, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_that_are_none(capsys, tmp_path, text):
    for config in (GPT2Config(), MistralConfig()):
        config.save_pretrained(tmp_path / config.model_type)
    (tmp_path / "empty").mkdir()
    shaped = [(name, f"{name!r} is not a Llama-shaped model") for name in ("gpt2", "mistral")]
    for place, said in (*shaped, ("empty", "config.json"), ("gone", "gone")):
        line = ["prune", tmp_path / place, "--ratio", "0.2", "--calibration", text, "-o", tmp_path / "out"]
        assert said in refused(capsys, *line)
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_not_touched(capsys, tmp_path, model, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    line = ["prune", model, "--ratio", "0.2", "--calibration", text, "-o", tmp_path / "out"]
    assert "exists already" in refused(capsys, *line)
    assert (tmp_path / "out" / "mine").read_text() == "mine"


def test_recipes_that_are_none(capsys, tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("model: demo\noutput: out\nprune: {ratoi: 0.2}\n")
    assert "prune.ratoi" in (told := refused(capsys, "run", wrong)) and "prune.ratio" in told
    wrong.write_text("- 1\n- 2\n")
    assert "not a mapping" in refused(capsys, "run", wrong)
    assert "demo" in refused(capsys, "run", "dmeo")
    assert "plan" in refused(capsys, "plna")
    assert "--frobnicate" in refused(capsys, "--frobnicate")


def test_evaluation_and_recovery_check_before_they_load(capsys, tmp_path, model, text, llama):
    evaluation = ["eval", model, "--data", text]
    assert "from 2 to 128" in refused(capsys, *evaluation, "--seq-len", "4096")
    assert "from 1 to 31" in refused(capsys, *evaluation, "--seq-len", "32", "--stride", "32")
    assert "no such folder of task files" in refused(capsys, *evaluation, "--tasks", "t", "--include-path", "gone")
    assert "pass --data" in refused(capsys, "eval", model)
    recovery = ["recover", model, "--data", text, "-o", tmp_path / "out"]
    assert "--max-tokns" in refused(capsys, *recovery, "--max-tokns", "4")
    assert "--num_processes" in refused(capsys, *recovery, "--num_processes", "two")
    assert "'default'" in refused(capsys, *recovery, "--preset", "defualt")
    llama.config.save_pretrained(tmp_path / "config")
    for verb in ("eval", "recover"):
        line = [verb, tmp_path / "config", "--data", text]
        assert "holds no weights" in refused(capsys, *line, *(["-o", tmp_path / "out"] if verb == "recover" else []))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--rnak 4", "--rnak"),
        ("--rank", "argument --rank: expected one argument"),
        ("--rank many", "argument --rank: 'many' is not a whole number"),
        ("--rank 0", "rank=0 must be a whole number from 1"),
        ("--method half", "unknown method 'half'; allowed: lora, full"),
        ("--quantize 4bit", "quantize=4bit needs bitsandbytes: pip install bitsandbytes"),
        ("--distillation 0.5", "pass --teacher"),
        ("--split test", "split='test' is for evaluation and never trains"),
    ],
)
def test_settings_of_recovery_that_make_no_sense(capsys, tmp_path, model, text, flags, said):
    line = ["recover", model, "--data", text, "--seq-len", "32", "-o", tmp_path / "out", *flags.split()]
    assert said in refused(capsys, *line)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.training").exists()


def test_help_of_recovery_tells_every_setting(capsys):
    with pytest.raises(SystemExit):
        main(["recover", "--help"])
    told = capsys.readouterr().out
    assert {f"--{name.replace('_', '-')}" for name in RecoveryConfig.names()} <= set(re.findall(r"--[a-z-]+", told))
    assert "max_tokens=2000000" in told and "fsdp2" in told


def test_recover_and_merge(capsys, tmp_path, model, text):
    out, again = tmp_path / "out", tmp_path / "again"
    changes = "--rank 2 --learning-rate 1e-3 --batch-tokens 256 --held-out-tokens 0".split()
    line = ["recover", str(model), "--data", str(text), "--seq-len", "32", "--max-tokens", "512", "-o", str(out)]
    assert main([*line, *changes]) == 0
    settings = json.loads((out / "training_log.json").read_text())["settings"]
    assert (settings["rank"], settings["learning_rate"], settings["max_tokens"]) == (2, 1e-3, 512)
    # the base has moved
    elsewhere = model.rename(tmp_path / "elsewhere")
    assert "pass --base" in refused(capsys, "merge", out / "adapter", "-o", again)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert main(["merge", str(out / "adapter"), "--base", str(elsewhere), "-o", str(again)]) == 0
    assert identity.fingerprint(again) == identity.fingerprint(out)
    assert f"no adapter in {out}: give {out}/adapter" in refused(capsys, "merge", out, "-o", tmp_path / "three")
    assert "no adapter in" in refused(capsys, "merge", tmp_path / "gone", "-o", tmp_path / "three")
    assert "was trained on weights" in refused(capsys, "merge", out / "adapter", "--base", out, "-o", tmp_path / "three")
    # what will be evaluated on never trains
    line[1] = str(elsewhere)
    assert "cannot be trained on" in refused(capsys, *line[:-1], tmp_path / "three", "--evaluation", text)
    assert not (tmp_path / "three").exists()


def test_a_failure_shows_its_traceback_only_when_asked(capsys, tmp_path):
    assert main(["push", str(tmp_path / "gone"), "org/name"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert main(["push", str(tmp_path / "gone"), "org/name", "--debug"]) == 2
    told = capsys.readouterr().err
    assert "Traceback" in told and told.strip().splitlines()[-1].startswith("gqaprune: ")


def test_plan_needs_only_a_config_where_chance_decides(capsys, tmp_path, llama):
    llama.config.save_pretrained(tmp_path / "config")
    line = ["plan", str(tmp_path / "config"), "--backbone-ratio", "0.3", "--criterion", "random"]
    assert main([*line, "-o", str(tmp_path / "plan.json")]) == 0
    assert main([*line, "-o", str(tmp_path / "again.json")]) == 0
    assert (tmp_path / "plan.json").read_bytes() == (tmp_path / "again.json").read_bytes()
    assert "of the backbone" in capsys.readouterr().out


def test_rates_and_floors(capsys, tmp_path, model):
    line = ["plan", str(model), "--criterion", "magnitude", "-o", str(tmp_path / "plan.json")]
    assert main([*line, "--rates", "0.5,0.25,0"]) == 0
    plan = gp.PruningPlan.load(tmp_path / "plan.json")
    assert [len(layer.kv_groups) for layer in plan.layers] == [2, 3, 4]
    assert plan.target.layers[2] == plan.source.layers[2]
    assert main([*line, "--ratio", "0.3", "--min-kv-heads", "3", "--overwrite"]) == 0
    assert min(len(layer.kv_groups) for layer in gp.PruningPlan.load(tmp_path / "plan.json").layers) >= 3
    assert "2 rates for a model of 3 layers" in refused(capsys, *line, "--rates", "0.1,0.2", "--overwrite")


def test_kept_layers_widths_and_the_attention_share(capsys, tmp_path, model):
    line = ["plan", str(model), "--criterion", "magnitude", "--ratio", "0.1", "-o", str(tmp_path / "plan.json")]
    assert main([*line, "--keep-layers=-1,0", "--round-to", "8"]) == 0
    assert "allocation global (layers kept: 0, 2; FFN widths in multiples of 8)" in capsys.readouterr().out
    plan = gp.PruningPlan.load(tmp_path / "plan.json")
    dense, sizes = plan.source.layers, plan.target.layers
    assert sizes[0] == dense[0] and sizes[2] == dense[2] and sizes[1] != dense[1]
    assert sizes[1].ffn % 8 == 0
    assert main([*line, "--attention-share", "0", "--overwrite"]) == 0
    assert {layer.kv_heads for layer in gp.PruningPlan.load(tmp_path / "plan.json").target.layers} == {4}


def test_layer_importance_measures_what_it_needs(capsys, tmp_path, model, text):
    sizes = ["--calibration", str(text), "--samples", "8", "--seq-len", "32"]
    common = [str(model), "--ratio", "0.2", "--allocation", "layer_importance", "--temperature", "0.5"]
    statistics, out = str(tmp_path / "statistics"), tmp_path / "out"
    assert main(["prune", *common, *sizes, "--save-statistics", statistics, "-o", str(out)]) == 0
    assert "allocation layer_importance (temperature 0.5)" in capsys.readouterr().out
    # saved windows, and criteria that need none themselves
    given = {"again": ["--statistics", statistics], "random": [*sizes, "--criterion", "random"]}
    for name, flags in given.items():
        assert main(["plan", *common, *flags, "-o", str(tmp_path / f"{name}.json")]) == 0
    again, drawn = (gp.PruningPlan.load(tmp_path / f"{name}.json") for name in given)
    assert again == gp.PruningPlan.load(out / "prune_plan.json")
    assert again.target == drawn.target and again.layers != drawn.layers
    # statistics without windows of their own: the text is read
    windowless = str(tmp_path / "windowless")
    line = ["plan", str(model), "--ratio", "0.2", "--criterion", "magnitude", "-o", str(tmp_path / "uniform.json")]
    assert main([*line, "--allocation", "uniform", "--save-statistics", windowless]) == 0
    line = ["plan", *common, *sizes, "--statistics", windowless, "-o", str(tmp_path / "magnitude.json")]
    assert main(line) == 0
    assert gp.PruningPlan.load(tmp_path / "magnitude.json").target == again.target


def test_prune_eval_card_and_dry_push(capsys, tmp_path, model, text):
    sizes = ["--calibration", str(text), "--samples", "16", "--seq-len", "32"]
    statistics = str(tmp_path / "statistics")
    one, two, three = (str(tmp_path / name) for name in ("one", "two", "three"))
    line = ["prune", str(model), "--backbone-ratio", "0.3"]
    assert main([*line, *sizes, "--save-statistics", statistics, "-o", one]) == 0
    assert main([*line, "--statistics", statistics, "-o", two]) == 0
    plan = str(Path(one) / "prune_plan.json")
    assert main(["prune", str(model), "--plan", plan, "--statistics", statistics, "-o", three]) == 0
    capsys.readouterr()
    assert identity.fingerprint(one) == identity.fingerprint(two) == identity.fingerprint(three)
    assert identity.read_identity(one)["plan_hash"] == gp.PruningPlan.load(plan).hash()
    loaded = AutoModelForCausalLM.from_pretrained(one)
    assert isinstance(loaded, gp.PrunedLlamaForCausalLM) and loaded.prune_plan == json.loads(Path(plan).read_text())
    assert bool(torch.isfinite(loaded(torch.arange(10)[None]).logits).all())
    assert main(["eval", str(model), one, "--data", str(text), "--seq-len", "32", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert [entry["perplexity"][0]["tokens"] for entry in measured.values()] == [len(TEXT)] * 2
    assert main(["card", one, "--base-model", str(model), "--license", "apache-2.0", "--name", "org/small"]) == 0
    assert main(["push", one, "org/small", "--dry-run"]) == 0
    assert "model.safetensors" in capsys.readouterr().out


def test_a_plan_of_saved_statistics_is_the_same_plan(capsys, tmp_path, model, text):
    statistics, one, two = (str(tmp_path / name) for name in ("statistics", "one.json", "two.json"))
    line = ["plan", str(model), "--ratio", "0.2"]
    sizes = ["--calibration", str(text), "--samples", "8", "--seq-len", "32"]
    assert main([*line, *sizes, "--save-statistics", statistics, "-o", one]) == 0
    assert main([*line, "--statistics", statistics, "-o", two]) == 0
    assert Path(one).read_bytes() == Path(two).read_bytes()
    capsys.readouterr()
    for flags in (["--calibration", str(text)], ["--samples", "8"], ["--seq-len", "32"], ["--save-statistics", str(tmp_path / "x")]):
        told = refused(capsys, *line, "--statistics", statistics, *flags, "-o", str(tmp_path / "three.json"))
        assert f"saved statistics need no calibration pass: leave {flags[0]} out" in told
    wrong = [*line, "--statistics", statistics, "--criterion", "wanda", "-o", str(tmp_path / "three.json")]
    assert "for criterion curvature, not wanda" in refused(capsys, *wrong)
    assert not (tmp_path / "three.json").exists()


@pytest.mark.parametrize(
    "flags",
    ["--criterion magnitude", "--allocation global", "--temperature 1", "--attention-share 0.5", "--min-kv-heads 1",
     "--min-ffn 1", "--keep-layers 0", "--round-to 8"],
)  # fmt: skip
def test_a_saved_plan_is_not_changed_by_flags(capsys, tmp_path, model, flags):
    line = ["plan", str(model), "--ratio", "0.2", "--criterion", "magnitude", "-o", str(tmp_path / "plan.json")]
    assert main(line) == 0
    capsys.readouterr()
    line = ["prune", str(model), "--plan", str(tmp_path / "plan.json"), "--compensation", "none", "-o", str(tmp_path / "out")]
    flag = flags.split()[0]
    assert f"a saved plan says what is removed: leave {flag} out" in refused(capsys, *line, *flags.split())
    assert not (tmp_path / "out").exists() and main(line) == 0


def test_defaults_of_flags_are_those_of_the_request(model):
    from hf_gqaprune.cli import make_parser
    from hf_gqaprune.cli.verbs import _prune_request

    line = ["prune", str(model), "-o", "out"]
    given = {"--ratio 0.2": {"ratio": 0.2}, "--rates 0.1,0,0": {"rates": (0.1, 0.0, 0.0)}}
    for flags, fields in given.items():
        request = _prune_request(make_parser().parse_args([*line, *flags.split()]))
        assert request == PruneRequest(str(model), PruningConfig(**fields))


def test_help_names_every_criterion_and_allocation(capsys):
    from hf_gqaprune.selection.allocation import ALLOCATIONS
    from hf_gqaprune.statistics.criteria import CRITERIA

    with pytest.raises(SystemExit):
        main(["prune", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert all(re.search(rf"\b{name}\b", told) for name in (*CRITERIA, *ALLOCATIONS))
    assert "(default: curvature" in told and "(default: global" in told


@pytest.mark.parametrize(
    "flags, kept", [("--criterion curvature", False), ("--memory 2GiB", True), ("--criterion taylor --memory=2GiB", True)]
)
def test_an_interrupted_prune_says_whether_anything_is_kept(capsys, tmp_path, flags, kept):
    def stop(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    line = ["prune", "demo", "--ratio", "0.2", "--calibration", "demo", "--samples", "512", "--seq-len", "256"]
    try:
        # in the midst of it: the whole of it takes a minute
        signal.setitimer(signal.ITIMER_REAL, 3)
        assert main([*line, "-o", str(tmp_path / "out"), *flags.split()]) == 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("gqaprune: interrupted") and ("--resume goes on" in told) == kept
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", ["-1", str(2**32)])
def test_a_seed_that_no_training_takes(capsys, tmp_path, model, text, seed):
    recovery = ["recover", model, "--data", text, "--seq-len", "32", "-o", tmp_path / "out", "--seed", seed]
    assert f"seed={seed} must be a whole number from 0 to 4294967295" in refused(capsys, *recovery)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {model}\noutput: {tmp_path}/out\ncalibration: {{data: [{text}], samples: 8, seq_len: 32}}\n"
        f"prune: {{ratio: 0.2}}\nrecover: {{data: [{text}], seq_len: 32}}\nevaluate: {{data: [demo], seq_len: 32}}\n"
    )
    assert f"seed={seed} must be" in refused(capsys, "run", recipe, "--set", f"seed={seed}")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.training").exists()


def test_recipes_and_env(capsys, tmp_path):
    assert main(["recipes", "ls"]) == 0
    assert "demo" in capsys.readouterr().out
    assert main(["recipes", "cp", "demo", str(tmp_path / "mine.yaml")]) == 0
    assert main(["recipes", "show", "demo"]) == 0
    assert (tmp_path / "mine.yaml").read_text() in capsys.readouterr().out
    assert main(["env"]) == 0
    assert "transformers" in capsys.readouterr().out
