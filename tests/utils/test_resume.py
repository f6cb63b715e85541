"""What is interrupted at its very end, or while leftovers are removed, is gone on with or begun anew, never lost or mixed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.disk import contents
from support.tiny import tiny_llama, token_ids

from hf_gqaprune import (
    Calibration,
    Statistics,
    UsageError,
    WorkError,
    collect_statistics,
    make_plan,
    prune,
    prune_checkpoint,
    stream_statistics,
)
from hf_gqaprune.checkpoint.reader import WEIGHTS, read_header
from hf_gqaprune.checkpoint.writer import ShardWriter
from hf_gqaprune.plan import PruningPlan
from hf_gqaprune.streaming.activations import ActivationStore
from hf_gqaprune.streaming.refit import Refit, streams_disk_bytes
from hf_gqaprune.streaming.statistics import _Pass
from hf_gqaprune.utils import files
from hf_gqaprune.utils import resume as unfinished


def windows(seed: int = 0) -> Calibration:
    return Calibration.from_ids(token_ids(9, 16, seed=seed))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a model."""
    tiny_llama(layers=4).save_pretrained(tmp_path / "dense")
    return tmp_path


@pytest.fixture
def measured(place: Path) -> tuple[PruningPlan, Statistics]:
    statistics = stream_statistics(place / "dense", windows(), place / "statistics")
    return make_plan(statistics, backbone_ratio=0.3), statistics


def interrupt(*_args: Any, **_options: Any) -> None:
    raise KeyboardInterrupt


def when_all_is_written(patch: pytest.MonkeyPatch, work: Callable[[], None]) -> None:
    """Let `prune_checkpoint` do `work` before its output takes its name."""
    real = ShardWriter.sync

    def sync(self: ShardWriter) -> None:
        real(self)
        work()

    patch.setattr(ShardWriter, "sync", sync)


def busy_for(target: Path) -> Callable[[Any, Any], None]:
    """`os.rename` on a machine that does not let go of `target`."""
    real = os.rename

    def rename(source: Any, destination: Any) -> None:
        if Path(destination) == target:
            raise OSError(errno.EBUSY, "Device or resource busy")
        real(source, destination)

    return rename


@pytest.mark.parametrize("compensation", ["none", "least_squares"])
def test_when_all_layers_are_written(
    place: Path, measured: tuple[PruningPlan, Statistics], compensation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, statistics = measured
    arguments = (place / "dense", plan)
    options: dict[str, Any] = {"statistics": statistics, "compensation": compensation}
    prune_checkpoint(*arguments, place / "whole", **options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ShardWriter, "sync", interrupt)
        prune_checkpoint(*arguments, place / "out", **options)
    # everything is moved, but for the last step
    for times in range(2):
        with monkeypatch.context() as patch, pytest.raises(WorkError, match="busy.*pass --resume to go on"):
            patch.setattr(os, "rename", busy_for(place / "out"))
            prune_checkpoint(*arguments, place / "out", **options, resume=True)
        assert (place / ".out.unfinished" / "whole" / WEIGHTS).exists(), times
    # nothing is read again
    with monkeypatch.context() as patch:
        patch.setattr(Refit, "layer", interrupt)
        prune_checkpoint(*arguments, place / "out", **options, resume=True)
    assert contents(place / "out") == contents(place / "whole")
    assert sorted(path.name for path in place.iterdir()) == ["dense", "out", "statistics", "whole"]


@pytest.mark.parametrize("criterion", ["curvature", "wanda", "magnitude"])
def test_when_all_layers_are_measured(place: Path, criterion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (place / "dense", None if criterion == "magnitude" else windows())
    stream_statistics(*arguments, place / "expected", criterion=criterion)
    for resume in (False, True):
        with monkeypatch.context() as patch, pytest.raises(WorkError, match="busy.*pass --resume to go on"):
            patch.setattr(os, "rename", busy_for(place / "out"))
            stream_statistics(*arguments, place / "out", criterion=criterion, resume=resume)
    for name in ("_forward", "_back"):
        monkeypatch.setattr(_Pass, name, interrupt)
    stream_statistics(*arguments, place / "out", criterion=criterion, resume=True)
    assert contents(place / "out") == contents(place / "expected")


def test_what_was_to_be_replaced_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "config.json").write_text(folder.name)
    real = os.rename
    with monkeypatch.context() as patch, pytest.raises(OSError, match="busy"):
        patch.setattr(os, "rename", lambda a, b: busy_for(old)(a, b) if Path(a) == new else real(a, b))
        files.replace_folder(new, old)
    assert contents(tmp_path) == {"new/config.json": b"new", "old/config.json": b"old"}
    files.replace_folder(new, old)
    assert contents(tmp_path) == {"old/config.json": b"new"}


def test_an_output_that_came_meanwhile_is_not_replaced(
    place: Path, measured: tuple[PruningPlan, Statistics], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, _ = measured
    prune_checkpoint(place / "dense", plan, place / "whole")

    def another_call() -> None:
        (place / "out").mkdir()
        (place / "out" / "config.json").write_text("of another call")

    with monkeypatch.context() as patch, pytest.raises(UsageError, match="out exists already"):
        when_all_is_written(patch, another_call)
        prune_checkpoint(place / "dense", plan, place / "out")
    assert contents(place / "out") == {"config.json": b"of another call"}
    shutil.rmtree(place / "out")
    prune_checkpoint(place / "dense", plan, place / "out", resume=True)
    assert contents(place / "out") == contents(place / "whole")


def test_leftovers_that_were_half_removed_are_not_gone_on_with(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream_statistics(place / "dense", windows(2), place / "expected")
    real = _Pass._back
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_Pass, "_back", lambda self, index: real(self, index) if index > 1 else interrupt())
        stream_statistics(place / "dense", windows(1), place / "out")
    working = place / ".out.unfinished"
    assert any(working.glob("gradient-*"))

    def first_file(folder: Path, **_options: Any) -> None:
        (Path(folder) / unfinished.PROGRESS).unlink(missing_ok=True)
        if Path(folder).exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(unfinished.shutil, "rmtree", first_file)
        stream_statistics(place / "dense", windows(2), place / "out", overwrite=True)
    # also where only the note of what was begun is gone
    shutil.copytree(place / ".out.unfinished.dropped", working)
    stream_statistics(place / "dense", windows(2), place / "out")
    assert contents(place / "out") == contents(place / "expected")
    assert sorted(path.name for path in place.iterdir()) == ["dense", "expected", "out"]


def test_a_layer_that_did_not_reach_the_disk_is_fitted_again_however_often_it_is_interrupted(
    place: Path, measured: tuple[PruningPlan, Statistics], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, statistics = measured

    def go(until: int, resume: bool = True) -> None:
        real = Refit.layer

        def layer(self: Refit, index: int, *rest: Any) -> Any:
            if index == until:
                raise KeyboardInterrupt
            return real(self, index, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(Refit, "layer", layer)
            prune_checkpoint(
                place / "dense", plan, place / "out", statistics, compensation="least_squares", resume=resume
            )

    with pytest.raises(KeyboardInterrupt):
        go(3, resume=False)
    prune_checkpoint(place / "dense", plan, place / "whole", statistics, compensation="least_squares")
    tensors = read_header(place / "whole" / WEIGHTS)
    tensor = next(t for t in tensors if t.name == "model.layers.0.mlp.up_proj.weight")
    weights = place / ".out.unfinished" / WEIGHTS
    data = bytearray(weights.read_bytes())
    data[tensor.start] ^= 255
    weights.write_bytes(data)
    for until in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            go(until)
    go(4)
    assert contents(place / "out") == contents(place / "whole")


def test_the_room_for_streams_is_what_they_take(
    place: Path, measured: tuple[PruningPlan, Statistics], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, statistics = measured
    most = 0
    real = ActivationStore.commit

    def commit(self: ActivationStore, name: str) -> Any:
        nonlocal most
        found = real(self, name)
        tensors = (load_file(path)["tensor"] for path in self.folder.glob("*/*"))
        most = max(most, sum(tensor.nbytes for tensor in tensors))
        return found

    monkeypatch.setattr(ActivationStore, "commit", commit)
    prune_checkpoint(place / "dense", plan, place / "out", statistics, compensation="least_squares")
    hidden = json.loads((place / "dense" / "config.json").read_text())["hidden_size"]
    assert most == streams_disk_bytes(windows().tokens, hidden, torch.float32)


def test_buffers_of_old_checkpoints_are_not_in_the_way(place: Path, measured: tuple[PruningPlan, Statistics]) -> None:
    plan, statistics = measured
    options: dict[str, Any] = {"statistics": statistics, "compensation": "least_squares"}
    prune_checkpoint(place / "dense", plan, place / "expected", **options)
    path = place / "dense" / WEIGHTS
    old = {f"model.layers.{index}.self_attn.rotary_emb.inv_freq": torch.ones(4) for index in range(2)}
    save_file({**load_file(path), **old}, path, metadata={"format": "pt"})
    stream_statistics(place / "dense", windows(), place / "again")
    assert contents(place / "again") == contents(place / "statistics")
    prune_checkpoint(place / "dense", plan, place / "out", **options)
    assert (place / "out" / WEIGHTS).read_bytes() == (place / "expected" / WEIGHTS).read_bytes()


def test_statistics_of_other_weights_are_refused(place: Path, measured: tuple[PruningPlan, Statistics]) -> None:
    plan, statistics = measured
    model = tiny_llama(layers=4)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] += 1e-3
    model.save_pretrained(place / "tuned")
    with pytest.raises(UsageError, match=r"on other weights than the model's, first in layer 2, mlp.down_proj"):
        prune_checkpoint(place / "tuned", plan, place / "out", statistics, compensation="least_squares")
    for found in (statistics, collect_statistics(tiny_llama(layers=4), windows())):
        with pytest.raises(UsageError, match=r"first in layer 2, mlp.down_proj"):
            prune(model, plan, found, compensation="least_squares")
    # without re-fitting nothing of them is used
    prune(model, plan, statistics, compensation="none")


def test_inputs_are_not_lost_in_what_is_replaced(place: Path, measured: tuple[PruningPlan, Statistics]) -> None:
    plan, statistics = measured
    (place / "config.json").write_text('{"model_type": "llama"}')
    before = contents(place)
    for output in (place / "dense", place):
        with pytest.raises(UsageError, match="dense.* would be replaced by the output: choose another"):
            prune_checkpoint(place / "dense", plan, output, overwrite=True)
        with pytest.raises(UsageError, match="dense.* would be replaced by the output: choose another"):
            stream_statistics(place / "dense", windows(), output, overwrite=True)
    with pytest.raises(UsageError, match="statistics would be replaced by the output"):
        prune_checkpoint(
            place / "dense", plan, place / "statistics", statistics, compensation="least_squares", overwrite=True
        )
    assert contents(place) == before


@pytest.mark.parametrize(("method", "at"), [("_forward", 3), ("_back", 1)])
@pytest.mark.parametrize("lost", [0, 1])
def test_activations_that_were_in_memory_are_made_again(
    place: Path, monkeypatch: pytest.MonkeyPatch, method: str, at: int, lost: int
) -> None:
    """A GPU, or the memory beside it, holds the first ones; they go with the process."""
    stream_statistics(place / "dense", windows(), place / "expected")
    real = getattr(_Pass, method)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_Pass, method, lambda self, index: real(self, index) if index != at else interrupt())
        stream_statistics(place / "dense", windows(), place / "out")
    shutil.rmtree(place / ".out.unfinished" / f"input-{lost}")
    stream_statistics(place / "dense", windows(), place / "out", resume=True)
    assert contents(place / "out") == contents(place / "expected")


def test_a_folder_is_worked_in_by_one_call_at_a_time(
    place: Path, measured: tuple[PruningPlan, Statistics], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, _ = measured
    prune_checkpoint(place / "dense", plan, place / "whole")

    def other_calls() -> None:
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(UsageError, match="another process works in .*out.unfinished: wait until it has ended"):
                prune_checkpoint(place / "dense", plan, place / "out", **options)

    when_all_is_written(monkeypatch, other_calls)
    prune_checkpoint(place / "dense", plan, place / "out")
    assert contents(place / "out") == contents(place / "whole")
    assert sorted(path.name for path in place.iterdir()) == ["dense", "out", "statistics", "whole"]


def test_a_folder_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="out exists already"), files.new_folder(tmp_path / "out") as scratch:
        (scratch / "config.json").write_text("{}")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text("of another call")
    assert contents(tmp_path) == {"out/config.json": b"of another call"}


def test_an_output_that_cannot_be_written_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(UsageError, match="file/out cannot be written: .*file is a file"):
        files.refuse_existing(tmp_path / "file" / "out", False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").unlink()
    for path in (".", tmp_path):
        with pytest.raises(UsageError, match="is a mounted disk or holds the current folder, and stays: name a folder in it"):
            files.refuse_existing(path, False)
    with pytest.raises(UsageError, match="holds the current folder"):
        files.refuse_existing(tmp_path.parent, True)
    with pytest.raises(UsageError, match="is a mounted disk"):
        files.refuse_existing("/", True)
    assert files.refuse_existing("a/b/c", False) == Path("a/b/c")
