"""Where work is done: a device that is not there is refused, and on one that is all of it happens there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_gqaprune import Calibration, collect_statistics, make_plan, prune
from hf_gqaprune.cli import main
from hf_gqaprune.data.demo import demo_model_path as model_path
from hf_gqaprune.errors import UsageError, WorkError
from hf_gqaprune.utils.device import CPU, compute_dtype, memory_limit, select_device

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0


def test_without_a_name_the_first_gpu_is_taken_if_there_is_one() -> None:
    assert select_device(None) == (torch.device("cuda:0") if GPUS else CPU)
    assert select_device("auto") == select_device(None)
    assert select_device("cpu") == CPU


@pytest.mark.parametrize("name", ["", "tpu", "mps", "cpu:", "cpu:x", "cuda:", "cuda:-1", "cuda:x", "cuda:0:0"])
def test_what_is_no_device_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="must be cpu, cuda, cuda:N or auto"):
        select_device(name)


def test_a_gpu_that_is_not_there_is_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device = f"cuda:{GPUS}"
    for line in (
        ["prune", "demo", "--ratio", "0.2", "-o", str(tmp_path / "pruned")],
        ["plan", "demo", "--ratio", "0.2", "-o", str(tmp_path / "plan.json")],
        ["prune", "demo", "--ratio", "0.2", "--memory", "8GiB", "-o", str(tmp_path / "pruned")],
        ["eval", "demo", "--data", "demo"],
    ):
        assert main([*line, "--device", device]) == 2
        assert f"--device {device}: this machine has" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_full_gpu_is_told_in_one_line_with_the_way_out() -> None:
    full = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB"
    with pytest.raises(WorkError, match=r"^the memory of cpu is full \(CUDA out of memory\): use less$"), memory_limit(CPU, "use less"):
        raise torch.OutOfMemoryError(full)


def test_everything_is_done_on_the_device_of_the_model(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "support" / "simulated_device.py"
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = set(done.stdout.splitlines())
    assert {"curvature", "wanda", "taylor", "layer importance", "least_squares", "natural_gradient", "streamed", "resumed"} <= told
    assert "spilled to three places" in told
    assert {f"{name} over two devices" for name in ("curvature", "taylor", "least_squares", "natural_gradient")} <= told


def test_one_device_is_not_all_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["prune", "demo", "--ratio", "0.2", "--memory", "8GiB", "--device", "auto", "-o", str(tmp_path / "pruned")]
    assert main(line) == 2
    assert "use one: leave --device out" in capsys.readouterr().err


def test_what_is_offloaded_is_told_before_it_is_measured(tmp_path: Path) -> None:
    folder = model_path()
    whole = AutoModelForCausalLM.from_pretrained(folder)
    layers = [f"model.layers.{index}" for index in range(whole.config.num_hidden_layers)]
    names = ("model.embed_tokens", "model.rotary_emb", *layers, "model.norm", "lm_head")
    places = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path)
    windows = Calibration.from_ids(torch.randint(3, 100, (9, 16)))
    with pytest.raises(UsageError, match=r"^model.layers.1.* is offloaded, .*: a model that the devices do not hold is pruned"):
        collect_statistics(model, windows)
    plan = make_plan(collect_statistics(whole, windows), backbone_ratio=0.2)
    with pytest.raises(UsageError, match="is offloaded"):
        prune(model, plan, compensation="none")


def test_float16_is_never_computed_in_on_a_cpu_and_float32_stays() -> None:
    assert compute_dtype(torch.float16, CPU) == torch.float32
    assert compute_dtype(torch.float32, CPU) == torch.float32
    # by measurement, once
    assert compute_dtype(torch.bfloat16, CPU) in (torch.bfloat16, torch.float32)
    assert compute_dtype(torch.bfloat16, CPU) == compute_dtype(torch.bfloat16, CPU)
