"""`accelerate launch` starts as many processes as asked, and what they train does not depend on how many."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hf_gqaprune import UsageError
from hf_gqaprune.configuration import RecoveryConfig, builtin
from hf_gqaprune.trainer.launch import accelerate_flags, launch, thread_flags
from hf_gqaprune.trainer.recovery import main
from hf_gqaprune.trainer.request import make_request
from hf_gqaprune.trainer.steps import plan_steps

SETTINGS = {"seq_len": 32, "max_tokens": 1024, "batch_tokens": 256, "rank": 4, "learning_rate": 1e-2}


@pytest.fixture
def folder(tmp_path: Path, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Path:
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "numbers.txt").write_text(" ".join(str(i * i) for i in range(400)))
    return str(tmp_path / "numbers.txt")


@pytest.mark.parametrize("distilled", [False, True])
def test_one_and_two_processes_train_the_same(folder: Path, text: str, tmp_path: Path, distilled: bool) -> None:
    """The same rows in every step, so that each is seen once; equal losses but for the order of the sums."""
    options: dict[str, Any] = {"teacher": _other(folder, tmp_path), "teacher_cache": True} if distilled else {}
    logs, weights = [], []
    for processes in (1, 2):
        out = launch(
            folder, [text], tmp_path / str(processes), accelerate=["--num_processes", str(processes)],
            held_out_tokens=96, **SETTINGS, **options,
        )  # fmt: skip
        logs.append(json.loads((out / "training_log.json").read_text()))
        weights.append(load_file(out / "model.safetensors"))
    one, two = logs
    assert (one["processes"], two["processes"]) == (1, 2)
    for name in ("steps", "tokens", "rows_per_step", "trainable"):
        assert one[name] == two[name]
    for first, second in zip(one["train"], two["train"], strict=True):
        assert first["tokens"] == second["tokens"]
        for name in ("loss", *(("cross_entropy", "divergence") if distilled else ())):
            assert first[name] == pytest.approx(second[name], rel=1e-4)
    for first, second in zip(one["held_out"], two["held_out"], strict=True):
        assert first["perplexity"] == pytest.approx(second["perplexity"], rel=1e-3)
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-3, rtol=1e-2)


def _other(folder: Path, tmp_path: Path) -> Path:
    """A teacher that predicts something else than the model in `folder`."""
    model = LlamaForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.data.mul_(2 if parameter.ndim == 2 else 1)
    model.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.mark.parametrize(("processes", "threads"), [(1, None), (2, None), (1, 1)])
def test_the_processes_share_all_cores(
    folder: Path, text: str, tmp_path: Path, processes: int, threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    settings, flags = {**SETTINGS, "max_tokens": 512, "threads": threads}, ["--num_processes", str(processes)]
    out = launch(folder, [text], tmp_path / "out", accelerate=flags, **settings)
    expected = threads or max(1, len(os.sched_getaffinity(0)) // processes)
    assert json.loads((out / "training_log.json").read_text())["threads"] == expected


def test_the_user_s_threads_have_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = accelerate_flags(["--accelerate_config", "single"])
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert thread_flags(flags, None) == []
    assert thread_flags(flags, 5) == ["--num_cpu_threads_per_process", "5"]
    assert thread_flags([*flags, "--num_cpu_threads_per_process", "7"], 5) == []


def test_what_a_process_refuses_arrives_as_one_line(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(UsageError, match="short has 5 tokens, fewer than one window of 31"):
        launch(folder, [str(tmp_path / "short.txt")], tmp_path / "out", **SETTINGS)
    assert "Traceback" not in capfd.readouterr().err


def test_sharded_layers_of_unequal_size_equal_the_unsharded_model() -> None:
    worker = Path(__file__).parents[1] / "support" / "fsdp_worker.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(worker)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("name", "distributed", "processes", "cpu"),
    [
        ("single", "NO", 1, False),
        ("multi_gpu", "MULTI_GPU", 2, False),
        ("fsdp2", "FSDP", 2, False),
        ("zero3", "DEEPSPEED", 2, False),
        ("cpu_2", "MULTI_GPU", 2, True),
    ],
)
def test_every_packaged_configuration_loads(name: str, distributed: str, processes: int, cpu: bool) -> None:
    config = load_config_from_file(str(builtin("accelerate")[name]))
    assert config.distributed_type == distributed
    assert (config.num_processes, config.use_cpu) == (processes, cpu)
    assert config.mixed_precision in ("no", "bf16")
    # what accelerate makes of the file when it launches
    args = launch_command_parser().parse_args(["--config_file", str(builtin("accelerate")[name]), "script"])
    args, _, _ = _validate_launch_command(args)
    assert (args.num_processes, args.num_machines) == (processes, 1)
    assert args.use_fsdp == (name == "fsdp2") and args.use_deepspeed == (name == "zero3")
    assert args.multi_gpu == (distributed == "MULTI_GPU") and args.use_cpu == cpu
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if name == "zero3":
        assert config.deepspeed_config["zero_stage"] == 3


def test_no_packaged_configuration_is_untested() -> None:
    assert set(builtin("accelerate")) == {"single", "multi_gpu", "fsdp2", "zero3", "cpu_2"}


def test_the_configuration_follows_from_the_flags(tmp_path: Path) -> None:
    files = {name: str(path) for name, path in builtin("accelerate").items()}
    assert accelerate_flags([])[:2] == ["--config_file", files["single"]]
    assert accelerate_flags(["--accelerate_config", "fsdp2", "--num_machines", "2"]) == [
        "--config_file", files["fsdp2"], "--num_machines", "2",
    ]  # fmt: skip
    own = tmp_path / "own.yaml"
    own.write_text("{}")
    assert accelerate_flags(["--accelerate_config", str(own)]) == ["--config_file", str(own)]
    assert accelerate_flags(["--config_file", "x.yaml"]) == ["--config_file", "x.yaml"]
    with pytest.raises(UsageError, match=r"unknown accelerate configuration 'fsdp' \(did you mean 'fsdp2'\?\)"):
        accelerate_flags(["--accelerate_config", "fsdp"])
    with pytest.raises(UsageError, match="--accelerate_config needs a file or one of cpu_2"):
        accelerate_flags(["--accelerate_config"])
    with pytest.raises(UsageError, match="invalid int value: 'two'"):
        accelerate_flags(["--num_processes", "two"])


def test_the_step_holds_the_same_tokens_on_any_number_of_processes(folder: Path, text: str, tmp_path: Path) -> None:
    request = make_request(folder, [text], tmp_path / "out", **{**SETTINGS, "device_tokens": 96})
    for processes, rows, accumulation in ((1, 2, 4), (2, 2, 2), (4, 2, 1), (8, 1, 1)):
        steps = plan_steps(request, 100, processes)
        assert (steps.rows, steps.accumulation, steps.rows_per_step) == (rows, accumulation, 8)
        assert (steps.per_epoch, steps.total) == (12, 12)
    # the nearest size from above that all can share, and no more than there is
    assert plan_steps(request, 100, 3).rows_per_step == 9
    assert plan_steps(request, 5, 3).rows_per_step == 3
    with pytest.raises(UsageError, match="makes 2 rows for 3 processes"):
        plan_steps(request, 2, 3)


def test_a_yaml_file_says_what_recover_is_called_with(
    folder: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "recover.yaml"
    arguments = {"model": str(folder), "data": [text], "output": str(tmp_path / "out"), "preset": "alpaca", **SETTINGS}
    config.write_text(yaml.safe_dump(arguments))
    assert main(["--config", str(config)]) == 0
    log = json.loads((tmp_path / "out" / "training_log.json").read_text())
    assert (log["settings"]["rank"], log["settings"]["epochs"]) == (4, 3)

    config.write_text(yaml.safe_dump({**arguments, "rnak": 3}))
    assert main(["--config", str(config)]) == 2
    assert "unknown key in the recovery's configuration: 'rnak' (did you mean 'rank'?)" in capsys.readouterr().err
    for content, message in (
        ("- 1", "must be a mapping"),
        ("a: [", "is not YAML"),
        ("model: x", "does not name output"),
    ):
        config.write_text(content)
        assert main(["--config", str(config)]) == 2
        assert message in capsys.readouterr().err
    assert main(["--config", str(tmp_path / "none.yaml")]) == 2


def test_a_request_survives_the_way_to_the_processes(folder: Path, text: str, tmp_path: Path) -> None:
    from hf_gqaprune.trainer.request import request_from_yaml

    request = make_request(
        folder, [text, f"{text}=0.5"], tmp_path / "out", preset="alpaca", seed=3, teacher=folder, distillation=0.5,
        evaluation=["demo"], **{**SETTINGS, "max_tokens": None},
    )  # fmt: skip
    assert request_from_yaml(yaml.safe_dump(request.to_dict())) == request
    assert request.config.max_tokens is None
    # trackers need not be installed for this
    tracked = replace(request, config=replace(request.config, report_to=("tensorboard", "wandb")))
    arguments = yaml.safe_load(yaml.safe_dump(tracked.to_dict()))
    settings = {name: value for name, value in arguments.items() if name in RecoveryConfig.names()}
    assert RecoveryConfig.from_dict(settings) == tracked.config


def test_a_failure_is_told_with_its_reason(folder: Path, text: str, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    model.model.norm.weight.data[0] = math.inf
    model.save_pretrained(folder)
    arguments = {
        "model": str(folder),
        "data": [text],
        "output": str(tmp_path / "out"),
        "held_out_tokens": 0,
        **SETTINGS,
    }
    config, failure = tmp_path / "recover.yaml", tmp_path / "failure.json"
    config.write_text(yaml.safe_dump(arguments))
    # to the launching process, which raises it again
    assert main(["--config", str(config), "--failure", str(failure)]) == 0
    told = json.loads(failure.read_text())
    assert told["kind"] == "WorkError" and told["message"].startswith(
        "the loss is nan at step 1, in a batch of 8 rows"
    )
    # what nobody expected, with its traceback
    config.write_text(yaml.safe_dump({**arguments, "overwrite": True, "evaluation": [[text]]}))
    assert main(["--config", str(config), "--failure", str(failure)]) == 0
    told = json.loads(failure.read_text())
    assert told["kind"] == "AttributeError" and "Traceback" in told["traceback"]
    config.write_text(yaml.safe_dump(arguments))
    # or to the user
    assert main(["--config", str(config)]) == 2
    config.write_text(yaml.safe_dump({**arguments, "overwrite": True}))
    assert main(["--config", str(config)]) == 1
