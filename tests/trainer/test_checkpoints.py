"""A recovery that was killed, or found the disk full, goes on to the weights of one that was left alone."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.disk import files_of_at_most
from support.recovering import SETTINGS, assert_equal_weights, prune_to, write_animals

from hf_gqaprune import UsageError, WorkError, recover
from hf_gqaprune.trainer import checkpoints
from hf_gqaprune.utils.files import exclusive_lock


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_animals(tmp_path_factory.mktemp("text"))


@pytest.fixture
def pruned(tmp_path: Path, dense: Path) -> Path:
    return prune_to(dense, tmp_path / "pruned", 0.3)


_CHILD = """
import json, os, signal, sys
from hf_gqaprune import recover
from hf_gqaprune.trainer import checkpoints, train
model, text, output, settings, stop_at, at_the_end = json.loads(sys.argv[1])
seal = checkpoints.seal
def seal_and_stop(checkpoint):
    seal(checkpoint)
    if checkpoint.name == stop_at:
        os.kill(os.getpid(), signal.SIGSTOP)
checkpoints.seal = seal_and_stop
if at_the_end:
    train._write_output = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
recover(model, [text], output, **settings)
"""


def start(
    model: Path, text: str, out: Path, settings: dict[str, Any], stop_at: str = "", at_the_end: bool = False
) -> subprocess.Popen[str]:
    """`recover` in a process of its own.

    It stops itself (SIGSTOP) behind the checkpoint `stop_at`; `at_the_end` it kills itself when all is trained and nothing
    written.
    """
    arguments = json.dumps([str(model), text, str(out), settings, stop_at, at_the_end], default=str)
    return subprocess.Popen([sys.executable, "-c", _CHILD, arguments], stderr=subprocess.PIPE, text=True)


def wait_for(child: subprocess.Popen[str], checkpoint: Path) -> None:
    while not (checkpoint / checkpoints.MANIFEST).exists():
        assert child.poll() is None, "ended before it could be stopped"
        time.sleep(0.005)


def wait_until_stopped(child: subprocess.Popen[str]) -> None:
    process = psutil.Process(child.pid)
    while process.status() != psutil.STATUS_STOPPED:
        assert child.poll() is None, "ended before it stopped itself"
        time.sleep(0.005)


def kill(child: subprocess.Popen[str]) -> None:
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL


def test_killed_three_times_it_ends_with_the_same_weights(pruned: Path, dense: Path, text: str, tmp_path: Path) -> None:
    settings = {
        **SETTINGS, "dropout": 0.1, "teacher": dense, "max_tokens": 768 * 4, "checkpoints": 12, "held_out_tokens": 64,
    }  # fmt: skip
    out, work = tmp_path / "out", tmp_path / "out.training"
    for step in (2, 6):
        child = start(pruned, text, out, {**settings, "resume": step > 2}, stop_at=f"checkpoint-{step}")
        wait_until_stopped(child)
        with pytest.raises(UsageError, match="another process works in .*out.training: wait until it has ended"):
            recover(pruned, [text], out, resume=True, **settings)
        kill(child)
        assert not out.exists()
    last = checkpoints.latest(work)
    assert last is not None
    with pytest.raises(UsageError, match="holds an unfinished training: pass --resume"):
        recover(pruned, [text], out, **settings)
    with pytest.raises(UsageError, match="started with other values of learning_rate"):
        recover(pruned, [text], out, resume=True, **{**settings, "learning_rate": 1e-3})
    # as if it had been killed while it wrote
    file = last / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:100])
    assert checkpoints.latest(work) not in (None, last)

    child = start(pruned, text, out, {**settings, "resume": True}, at_the_end=True)
    child.communicate()
    assert child.returncode == -signal.SIGKILL and not out.exists()
    recover(pruned, [text], out, resume=True, **settings)
    assert not work.exists()
    recover(pruned, [text], tmp_path / "straight", **settings)
    assert_equal_weights(out, tmp_path / "straight")
    logs = [json.loads((folder / "training_log.json").read_text()) for folder in (out, tmp_path / "straight")]
    assert all(logs[0][name] == logs[1][name] for name in ("train", "steps", "tokens"))
    # a resumed run measures once more where it starts
    assert [entry for entry in logs[1]["held_out"] if entry not in logs[0]["held_out"]] == []


def test_terminated_it_takes_along_what_it_has_started(pruned: Path, text: str, tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "out.training"
    settings = {**SETTINGS, "max_tokens": 768 * 40, "checkpoints": 120}
    line = ["-m", "hf_gqaprune", "recover", str(pruned), "--data", text, "-o", str(out)]
    changes = [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    child = subprocess.Popen([sys.executable, *line, *changes], stderr=subprocess.PIPE, text=True)
    wait_for(child, work / "checkpoint-1")
    child.terminate()
    child.communicate()
    assert child.returncode == 128 + signal.SIGTERM and not out.exists()
    # held by whoever still trains
    with exclusive_lock(work):
        pass


def test_a_full_disk_leaves_the_last_whole_checkpoint(pruned: Path, text: str, tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "out.training"
    settings = {**SETTINGS, "rank": 8, "max_tokens": 768 * 5, "checkpoints": 15, "held_out_tokens": 0}
    recover(pruned, [text], tmp_path / "straight", **settings)
    size = (tmp_path / "straight" / "adapter" / "adapter_model.safetensors").stat().st_size
    child = start(pruned, text, out, settings, stop_at="checkpoint-2")
    wait_until_stopped(child)
    # from now on the adapter can be written; the optimizer's state, twice its size, cannot
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (size + size // 2, resource.RLIM_INFINITY))
    child.send_signal(signal.SIGCONT)
    _, told = child.communicate()
    last = checkpoints.latest(work)
    assert last is not None
    assert f"{last} is kept: pass --resume to continue" in told and "could not be written" in told and "MiB free on the disk" in told
    recover(pruned, [text], out, resume=True, **settings)
    assert_equal_weights(out, tmp_path / "straight")


def test_no_room_for_the_result_keeps_the_training(pruned: Path, text: str, tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "out.training"
    settings = {**SETTINGS, "held_out_tokens": 0}
    recover(pruned, [text], tmp_path / "straight", **settings)
    sizes = [path.stat().st_size for path in (tmp_path / "straight").rglob("*.safetensors")]
    # more than a checkpoint's parts and less than the merged weights
    assert max(sizes) > 4 * min(sizes)
    told = "out could not be written .*out.training: pass --resume to continue"
    with files_of_at_most(max(sizes) - 1), pytest.raises(WorkError, match=told):
        recover(pruned, [text], out, **settings)
    assert not out.exists() and checkpoints.latest(work) is not None
    recover(pruned, [text], out, resume=True, **settings)
    assert_equal_weights(out, tmp_path / "straight")


def test_an_incomplete_checkpoint_is_warned_of_and_skipped(tmp_path: Path, caplog: Any) -> None:
    for step in (2, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_bytes(b"12345")
        checkpoints.seal(folder)
    assert checkpoints.latest(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / "weights").write_bytes(b"1234")
    assert checkpoints.latest(tmp_path) == tmp_path / "checkpoint-2"
    assert "checkpoint-10 is incomplete" in caplog.text
    (tmp_path / "checkpoint-2" / checkpoints.MANIFEST).unlink()
    assert checkpoints.latest(tmp_path) is None
    checkpoints.remove_incomplete(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_weights_under_the_same_name_are_not_resumed(
    pruned: Path, dense: Path, text: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(WorkError, match="not finite|is nan|is inf"):
        recover(pruned, [text], out, **{**SETTINGS, "learning_rate": 1e30})
    assert (tmp_path / "out.training").exists()
    shutil.rmtree(pruned)
    prune_to(dense, pruned, 0.2)
    with pytest.raises(UsageError, match="are not those that"):
        recover(pruned, [text], out, resume=True, **{**SETTINGS, "learning_rate": 1e30})


