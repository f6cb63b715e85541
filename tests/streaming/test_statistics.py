"""A checkpoint on disk, layer by layer, gives what the whole model in memory gives, bit for bit, however often interrupted."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
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
from hf_gqaprune.checkpoint import resolve_model
from hf_gqaprune.models.shapes import ModelShape
from hf_gqaprune.statistics.criteria import CRITERIA
from hf_gqaprune.streaming.activations import ActivationStore
from hf_gqaprune.streaming.layers import Layers
from hf_gqaprune.streaming.statistics import statistics_disk_bytes as room
from hf_gqaprune.utils.files import check_disk_space

SHAPES: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "gqa": ({"layers": 3, "kv_heads": 4, "ffn": 24}, torch.float32),
    "biases": ({"layers": 2, "attention_bias": True, "mlp_bias": True}, torch.float32),
    "tied": ({"layers": 2, "tie_word_embeddings": True}, torch.float32),
    "bfloat16": ({"layers": 3, "n_rep": 3}, torch.bfloat16),
    "eleven": ({"layers": 11}, torch.float32),
}


def windows(count: int = 20) -> Calibration:
    return Calibration.from_ids(token_ids(count, 12))


def saved(folder: Path, dtype: torch.dtype = torch.float32, **shape: Any) -> Any:
    model = tiny_llama(**shape).to(dtype)
    model.save_pretrained(folder)
    return resolve_model(folder).load()


def assert_same(ours: Statistics, theirs: Statistics) -> None:
    assert (ours.source, ours.criterion, ours.seed) == (theirs.source, theirs.criterion, theirs.seed)
    assert list(ours.blocks) == list(theirs.blocks)
    for key, block in ours.blocks.items():
        other = theirs.blocks[key]
        assert torch.equal(block.curve.order, other.curve.order), key
        assert torch.equal(block.curve.cost, other.curve.cost), key
        assert block.moments is not None and other.moments is not None
        assert block.moments.tokens == other.moments.tokens
        for name in ("inputs", "input_mean", "gradients"):
            a, b = getattr(block.moments, name), getattr(other.moments, name)
            assert (a is None and b is None) or torch.equal(a, b), (key, name)


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.mark.parametrize("criterion", ["curvature", "wanda", "taylor"])
@pytest.mark.parametrize("shape", SHAPES)
def test_streamed_statistics_are_those_of_the_model_in_memory(tmp_path: Path, shape: str, criterion: str) -> None:
    sizes, dtype = SHAPES[shape]
    model = saved(tmp_path / "dense", dtype, **sizes)
    before = weights(tmp_path / "dense")
    streamed = stream_statistics(tmp_path / "dense", windows(), tmp_path / "statistics", criterion=criterion)
    assert_same(streamed, collect_statistics(model, windows(), criterion=criterion))
    assert weights(tmp_path / "dense") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "statistics"]
    assert_same(Statistics.load(tmp_path / "statistics"), streamed)


def test_batches_are_summed_as_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_gqaprune.data.windows.TOKENS_PER_BATCH", 36)
    monkeypatch.setattr("hf_gqaprune.models.losses.LOGITS_AT_ONCE", 48 * 10)
    model = saved(tmp_path / "dense", layers=2)
    streamed = stream_statistics(tmp_path / "dense", windows(), tmp_path / "statistics")
    assert_same(streamed, collect_statistics(model, windows()))
    plan = make_plan(streamed, backbone_ratio=0.4)
    prune(model, plan, streamed, compensation="least_squares").save_pretrained(tmp_path / "memory")
    prune_checkpoint(tmp_path / "dense", plan, tmp_path / "disk", streamed, compensation="least_squares")
    name = "model.safetensors"
    assert (tmp_path / "disk" / name).read_bytes() == (tmp_path / "memory" / name).read_bytes()


@pytest.mark.parametrize("shape", SHAPES)
def test_streamed_pruning_writes_the_weights_of_the_path_in_memory(tmp_path: Path, shape: str) -> None:
    sizes, dtype = SHAPES[shape]
    model = saved(tmp_path / "dense", dtype, **sizes)
    statistics = stream_statistics(tmp_path / "dense", windows(), tmp_path / "statistics")
    # floors of 0: blocks may go
    plan = make_plan(statistics, backbone_ratio=0.4, min_kv_heads=0, min_ffn=0)
    prune(model, plan, statistics, compensation="least_squares").save_pretrained(tmp_path / "memory")
    prune_checkpoint(tmp_path / "dense", plan, tmp_path / "disk", statistics, compensation="least_squares")
    name = "model.safetensors"
    assert (tmp_path / "disk" / name).read_bytes() == (tmp_path / "memory" / name).read_bytes()
    # what was pruned is measured and pruned again, skipped blocks and all
    again = stream_statistics(tmp_path / "disk", windows(), tmp_path / "again")
    pruned = resolve_model(tmp_path / "disk").load()
    assert_same(again, collect_statistics(pruned, windows()))
    second = make_plan(again, backbone_ratio=0.2)
    prune(pruned, second, again, compensation="least_squares").save_pretrained(tmp_path / "memory2")
    prune_checkpoint(tmp_path / "disk", second, tmp_path / "disk2", again, compensation="least_squares")
    assert (tmp_path / "disk2" / name).read_bytes() == (tmp_path / "memory2" / name).read_bytes()


def test_without_windows_each_block_is_fitted_by_itself(tmp_path: Path) -> None:
    model = saved(tmp_path / "dense", layers=2)
    measured = collect_statistics(model, windows())
    plain = Statistics(measured.source, measured.criterion, measured.blocks)
    plan = make_plan(plain, backbone_ratio=0.4)
    prune(model, plan, plain, compensation="least_squares").save_pretrained(tmp_path / "memory")
    prune_checkpoint(tmp_path / "dense", plan, tmp_path / "disk", plain, compensation="least_squares")
    name = "model.safetensors"
    assert (tmp_path / "disk" / name).read_bytes() == (tmp_path / "memory" / name).read_bytes()


@contextmanager
def failing_at(monkeypatch: pytest.MonkeyPatch, call: int) -> Any:
    """Reading the `call`-th layer fails halfway."""
    real, calls = Layers.layer, 0

    def layer(self: Layers, index: int, following: int | None = None) -> Any:
        nonlocal calls
        calls += 1
        if calls == call + 1:
            raise WorkError("the disk is gone")
        return real(self, index, following)

    with monkeypatch.context() as patch:
        patch.setattr(Layers, "layer", layer)
        yield


@pytest.mark.parametrize("criterion", ["curvature", "wanda"])
def test_measuring_goes_on_after_the_last_finished_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, criterion: str
) -> None:
    model = saved(tmp_path / "dense", layers=3)
    expected = collect_statistics(model, windows(), criterion=criterion)
    passes = 2 if criterion == "curvature" else 1
    for call in range(passes * 3):
        out = tmp_path / f"out-{call}"
        with failing_at(monkeypatch, call), pytest.raises(WorkError, match="the disk is gone"):
            stream_statistics(tmp_path / "dense", windows(), out, criterion=criterion)
        assert not out.exists()
        # what was done is not done again
        with failing_at(monkeypatch, passes * 3 - call):
            assert_same(stream_statistics(tmp_path / "dense", windows(), out, criterion=criterion, resume=True), expected)


def test_refitting_goes_on_after_the_last_finished_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "dense", layers=3)
    statistics = stream_statistics(tmp_path / "dense", windows(), tmp_path / "statistics")
    plan = make_plan(statistics, backbone_ratio=0.4)
    arguments = (tmp_path / "dense", plan)
    prune_checkpoint(*arguments, tmp_path / "whole", statistics, compensation="least_squares")
    for call in range(3):
        out = tmp_path / f"out-{call}"
        with failing_at(monkeypatch, call), pytest.raises(WorkError, match="pass --resume to go on"):
            prune_checkpoint(*arguments, out, statistics, compensation="least_squares")
        assert not out.exists()
        with pytest.raises(UsageError, match="begun with another compensation"):
            prune_checkpoint(*arguments, out, compensation="none", resume=True)
        with failing_at(monkeypatch, 3 - call):
            prune_checkpoint(*arguments, out, statistics, compensation="least_squares", resume=True)
        assert weights(out) == weights(tmp_path / "whole")


def test_killed_at_once_and_resumed(tmp_path: Path) -> None:
    saved(tmp_path / "dense", layers=12, ffn=64, kv_heads=4)
    code = (
        "import sys, torch; torch.set_num_threads(1); sys.path[:0] = [sys.argv[2], sys.argv[2] + '/..']; import hf_gqaprune as gp; "
        "from test_statistics import windows; d = sys.argv[1]; gp.stream_statistics(d + '/dense', windows(), d + '/out')"
    )
    working = tmp_path / ".out.unfinished"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)], stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while process.poll() is None and not (working / "gradient-10").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    resumed = stream_statistics(tmp_path / "dense", windows(), tmp_path / "out", resume=True)
    assert_same(resumed, collect_statistics(resolve_model(tmp_path / "dense").load(), windows()))


def test_bad_requests_are_refused_before_any_work(tmp_path: Path) -> None:
    saved(tmp_path / "dense", layers=2)
    with pytest.raises(UsageError, match="unknown criterion 'curvatur'"):
        stream_statistics(tmp_path / "dense", windows(), tmp_path / "out", criterion="curvatur")
    long = Calibration.from_ids(token_ids(8, 65))
    with pytest.raises(UsageError, match="windows of 65 tokens are longer than the 64 positions"):
        stream_statistics(tmp_path / "dense", long, tmp_path / "out")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("")
    with pytest.raises(UsageError, match="there exists already"):
        stream_statistics(tmp_path / "dense", windows(), tmp_path / "there")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "there"]


def test_another_calibration_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "dense", layers=2)
    with failing_at(monkeypatch, 1), pytest.raises(WorkError):
        stream_statistics(tmp_path / "dense", windows(), tmp_path / "out")
    with pytest.raises(UsageError, match="pass --resume to go on with it"):
        stream_statistics(tmp_path / "dense", windows(), tmp_path / "out")
    with pytest.raises(UsageError, match="begun with another calibration"):
        stream_statistics(tmp_path / "dense", windows(8), tmp_path / "out", resume=True)


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    saved(tmp_path / "dense", layers=2)
    path = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(WorkError, match=r"layer 1: mlp.up_proj.weight holds values that are not finite"):
        stream_statistics(tmp_path / "dense", windows(), tmp_path / "out", criterion="wanda")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("criterion", ["curvature", "wanda"])
def test_room_is_asked_for_what_lies_on_the_disk_at_its_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, criterion: str
) -> None:
    """Long windows make activations most of it, at the turn of the passes; short ones moments, at the end."""
    saved(tmp_path / "dense", layers=3, ffn=200)
    source, rule = ModelShape.from_config(resolve_model(tmp_path / "dense").config), CRITERIA[criterion]
    held: list[int] = []
    real = ActivationStore.commit

    def commit(self: ActivationStore, name: str) -> Any:
        held.append(sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file()))
        return real(self, name)

    monkeypatch.setattr(ActivationStore, "commit", commit)
    for ids in (token_ids(300, 60), token_ids(4, 12)):
        asked = room(source, torch.float32, Calibration.from_ids(ids), rule)
        held.clear()
        stream_statistics(tmp_path / "dense", Calibration.from_ids(ids), tmp_path / "out", criterion=criterion, overwrite=True)
        # headers and curves beside
        assert max(held) - 40_000 < asked < max(held) * 1.3 + 40_000


def test_too_little_room_is_told_before_any_work(tmp_path: Path) -> None:
    total = shutil.disk_usage(tmp_path).total
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match=r"the moments need \d+\.\d\d GB more, and .* has \d+\.\d\d GB left: make room"):
        check_disk_space(tmp_path / "there" / "working", 2 * total, "the moments")
    check_disk_space(tmp_path / "there" / "working", 1, "the moments")


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_embeddings_norm_and_head_are_named_too(tmp_path: Path, name: str) -> None:
    saved(tmp_path / "dense", layers=2)
    path = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[3] = torch.inf
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(WorkError, match=f"{name} holds values that are not finite; repair the checkpoint first"):
        stream_statistics(tmp_path / "dense", windows(), tmp_path / "out")


def test_the_layer_whose_activations_overflow_is_named(tmp_path: Path) -> None:
    saved(tmp_path / "dense", layers=2)
    path = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"].fill_(3e38)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(WorkError, match="layer 1: what it puts out on calibration text is not finite"):
        stream_statistics(tmp_path / "dense", windows(), tmp_path / "out")
