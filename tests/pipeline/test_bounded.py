"""`--memory`: layer by layer the files of the path in memory, killed anywhere and resumed, and requests that are refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.disk import contents, files_of_at_most
from transformers import PreTrainedModel

from hf_gqaprune import Calibration
from hf_gqaprune.cli import main
from hf_gqaprune.data.windows import layer_batches
from hf_gqaprune.errors import UsageError
from hf_gqaprune.models.shapes import LayerShape, ModelShape
from hf_gqaprune.statistics.criteria import CRITERIA
from hf_gqaprune.streaming.activations import memory_capacity
from hf_gqaprune.streaming.memory_bound import PROCESS, Workload, check_gpu_memory, moments_disk_bytes
from hf_gqaprune.streaming.refit import streams_disk_bytes
from hf_gqaprune.streaming.statistics import statistics_disk_bytes as room
from hf_gqaprune.utils.memory import host_memory, parse_size

TEXT = "the quick brown fox jumps over the lazy dog, and then it counts: one two three four five. " * 60
INDEX = "model.safetensors.index.json"


@pytest.fixture
def place(tmp_path: Path, llama: PreTrainedModel, tokenizer: Any) -> Path:
    """A folder with a model in several shards and a text."""
    llama.to(torch.bfloat16).save_pretrained(tmp_path / "model", max_shard_size=30_000)
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def command(place: Path, verb: str, output: str, *flags: object) -> list[str]:
    sizes = ["--calibration", place / "text.txt", "--samples", 20, "--seq-len", 32, "--backbone-ratio", 0.3]
    return [str(word) for word in (verb, place / "model", *sizes, "-o", place / output, *flags)]


MEMORY = ("--memory", "2GiB")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("criterion", ["curvature", "taylor", "magnitude"])
@pytest.mark.parametrize("compensation", ["least_squares", "none"])
def test_the_files_of_the_path_in_memory(place: Path, criterion: str, compensation: str) -> None:
    flags = ("--criterion", criterion, "--compensation", compensation)
    before = contents(place / "model")
    assert main(command(place, "prune", "memory", *flags)) == 0
    assert main(command(place, "prune", "disk", *flags, *MEMORY)) == 0
    assert contents(place / "disk") == contents(place / "memory")
    assert contents(place / "model") == before
    assert names(place) == ["disk", "memory", "model", "text.txt"]


def test_plans_statistics_and_defaults(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = ("--save-statistics", place / "elsewhere" / "statistics")
    assert main(command(place, "plan", "memory.json", "--save-statistics", place / "wanted")) == 0
    assert main(command(place, "plan", "disk.json", *MEMORY, *saved)) == 0
    assert (place / "disk.json").read_bytes() == (place / "memory.json").read_bytes()
    assert contents(place / "elsewhere" / "statistics") == contents(place / "wanted")
    assert names(place / "elsewhere") == ["statistics"]
    # with --memory least_squares needs no mention
    assert main(command(place, "prune", "disk", *MEMORY)) == 0
    flags = ("--backbone-ratio", 0.3, "--compensation", "least_squares", "--statistics", place / "wanted")
    line = [str(word) for word in ("prune", place / "model", *flags, "-o")]
    assert main([*line, str(place / "memory")]) == 0
    assert main([*line, str(place / "replanned"), *MEMORY]) == 0
    given = ["prune", str(place / "model"), "--plan", str(place / "disk.json"), "-o", str(place / "replayed"), *MEMORY]
    assert main([*given, "--calibration", str(place / "text.txt"), "--samples", "20", "--seq-len", "32"]) == 0
    wanted = contents(place / "memory")
    assert contents(place / "disk") == contents(place / "replanned") == wanted
    assert contents(place / "replayed") == wanted
    assert main(command(place, "prune", "cut", *MEMORY, "--compensation", "none", "--criterion", "random")) == 0
    assert not [name for name in names(place) if name.startswith(".")]
    capsys.readouterr()
    assert main(command(place, "plan", "other.json", *MEMORY, *saved)) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.fixture
def larger(place: Path, tokenizer: Any) -> Path:
    """More layers, to be killed among."""
    from support.tiny import tiny_llama

    shutil.rmtree(place / "model")
    tiny_llama(layers=12, ffn=64, kv_heads=4, vocab_size=259).save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    return place


def killed(line: list[str], when: Callable[[], bool], meanwhile: Callable[[], None]) -> None:
    """Run a command in a process of its own, stop it as soon as `when`, and kill it after `meanwhile`."""
    code = "import sys, torch; torch.set_num_threads(1); from hf_gqaprune.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *line], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while process.poll() is None and not when():
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)
    try:
        meanwhile()
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_killed_while_measuring_and_while_pruning(larger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = larger
    line = command(place, "prune", "out", *MEMORY)
    assert main(command(place, "prune", "whole", "--compensation", "least_squares")) == 0
    statistics = place / ".out.measured" / ".statistics.unfinished"

    def refused_while_it_works() -> None:
        for flags in ((), ("--resume",), ("--overwrite",)):
            before = contents(place)
            assert "another process works in" in refused(capsys, [*line, *flags])
            assert contents(place) == before

    killed(line, lambda: (statistics / "gradient-8").exists(), refused_while_it_works)
    assert not (place / "out").exists() and not (place / ".out.measured" / "statistics").exists()
    first = {path.name: path.stat().st_mtime_ns for path in statistics.glob("layer-01*")}
    assert len(first) == 4
    progress = place / ".out.unfinished" / "progress.json"
    written = "layers.1."
    killed([*line, "--resume"], lambda: progress.exists() and written in progress.read_text(), refused_while_it_works)
    assert not (place / "out").exists()
    done = place / ".out.measured" / "statistics"
    # what was measured before the first kill was not measured again
    assert first == {name: (done / name).stat().st_mtime_ns for name in first}
    assert "model.layers.0.mlp.up_proj.weight" in json.loads(progress.read_text())["written"]
    assert main([*line, "--resume"]) == 0
    assert contents(place / "out") == contents(place / "whole")
    assert names(place) == ["model", "out", "text.txt", "whole"]


def test_a_recipe_may_name_the_bound(larger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = larger
    recipe = {
        "model": str(place / "model"),
        "output": str(place / "run"),
        "calibration": {"data": [str(place / "text.txt")], "samples": 20, "seq_len": 32},
        "prune": {"backbone_ratio": 0.3, "memory": "2GiB"},
        "recover": None,
        "evaluate": {"data": [str(place / "other.txt")], "seq_len": 32},
        "card": {"license": "apache-2.0"},
    }
    (place / "other.txt").write_text(TEXT.upper())
    (place / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(command(place, "prune", "whole", "--compensation", "least_squares")) == 0
    with files_of_at_most(30_000):
        assert "pass --resume to go on" in refused(capsys, ["run", str(place / "recipe.yaml")], 1)
    kept = place / "run" / ".pruned.measured" / ".statistics.unfinished"
    assert kept.is_dir() and not (place / "run" / "pruned").exists()
    assert main(["run", str(place / "recipe.yaml"), "--resume"]) == 0
    assert not kept.parent.exists()
    weights = "model.safetensors"
    assert (place / "run" / "pruned" / weights).read_bytes() == (place / "whole" / weights).read_bytes()
    assert "--memory 'much' is not a size" in refused(
        capsys, ["run", str(place / "recipe.yaml"), "--set", "prune.memory=much", "--overwrite"]
    )


def refused(capsys: pytest.CaptureFixture[str], line: list[str], code: int = 2) -> str:
    """Run a command that must fail; return its one line."""
    capsys.readouterr()
    assert main(line) == code
    # the seconds of stages that were finished before it stand above
    told = [line for line in capsys.readouterr().err.strip().splitlines() if not re.fullmatch(r"[a-z ]+: [\d.]+ s", line)]
    assert len(told) == 1, told
    return told[0]


def test_the_disk_fills_up_and_the_next_call_goes_on(larger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = larger
    line = command(place, "prune", "out", *MEMORY)
    assert main(command(place, "prune", "whole", "--compensation", "least_squares")) == 0
    before = contents(place / "model")
    weights = (place / "whole" / "model.safetensors").stat().st_size
    # no room for activations, for moments, for weights
    for limit, said in ((15_000, "cannot write "), (30_000, "cannot write "), (weights // 2, "cannot write ")):
        with files_of_at_most(limit):
            told = refused(capsys, [*line, "--resume"], 1)
        assert said in told and "pass --resume to go on, or delete it" in told, told
        assert not (place / "out").exists()
    assert contents(place / "model") == before
    # neither dropped nor mixed with another
    assert "is of an interrupted call: pass --resume" in refused(capsys, line)
    assert "begun with another calibration" in refused(capsys, [*line, "--resume", "--seed", "1"])
    assert "begun with another plan" in refused(capsys, [*line, "--resume", "--min-kv-heads", "4"])
    assert main([*line, "--resume"]) == 0
    assert contents(place / "out") == contents(place / "whole")
    assert names(place) == ["model", "out", "text.txt", "whole"]


def second(folder: Path) -> Path:
    """One shard of several."""
    return sorted(folder.glob("*.safetensors"))[1]


def cut_off(folder: Path) -> None:
    path = second(folder)
    os.truncate(path, path.stat().st_size - 1)


def lie(folder: Path) -> None:
    path = second(folder)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.popitem()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def lose_a_shard(folder: Path) -> None:
    second(folder).unlink()


def pickle(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80")


def lose_a_tensor(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    index = json.loads((folder / INDEX).read_text())
    path = folder / index["weight_map"].pop(name)
    save_file({key: tensor for key, tensor in load_file(path).items() if key != name}, path, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("memory", [MEMORY, ()])
@pytest.mark.parametrize("verb", ["plan", "prune"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_a_tensor, "config.json asks for model.layers.1.mlp.up_proj.weight, which no shard holds"),
        (cut_off, "is truncated, or its safetensors header corrupt: "),
        (lie, ".safetensors: "),
        (lose_a_shard, "names model-00002-of-"),
        (pickle, "holds pickles (pytorch_model.bin), which are not read: convert them with python -c "),
    ],
)
def test_a_checkpoint_that_is_not_whole(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    message: str,
    verb: str,
    memory: tuple[str, ...],
) -> None:
    damage(place / "model")
    before = contents(place)
    told = refused(capsys, command(place, verb, "out", *memory))
    assert message in told and str(place / "model") in told
    assert contents(place) == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_a_tensor, "config.json asks for model.layers.1.mlp.up_proj.weight, which is not there"),
        (cut_off, "is truncated, or its safetensors header corrupt: "),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_not_measured(
    place: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], message: str
) -> None:
    damage(place / "model")
    told = refused(capsys, ["eval", str(place / "model"), "--data", str(place / "text.txt"), "--seq-len", "32"])
    assert message in told


def test_a_weight_that_is_not_finite_is_named_and_nothing_looks_finished(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = second(place / "model")
    tensors = load_file(path)
    name = next(name for name in tensors if ".layers." in name and tensors[name].ndim == 2)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    told = refused(capsys, command(place, "prune", "out", *MEMORY), 1)
    assert f"{name.removeprefix('model.layers.').partition('.')[2]} holds values that are not finite" in told
    assert names(place) == [".out.measured", "model", "text.txt"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--memory", "lots"), "--memory 'lots' is not a size such as 6GiB, 8GB or 512MiB"),
        (("--memory", "8"), "--memory '8' is not a size"),
        (("--memory", "-8GiB"), "expected one argument"),
        (("--memory", "0GiB"), "--memory '0GiB' is not a size"),
        (("--memory", "1MiB"), "--memory 1MiB is too little: "),
        ((*MEMORY, "--compensation", "natural_gradient"), "natural_gradient needs both models in memory: with --memory"),
        ((*MEMORY, "--allocation", "search"), "allocation search needs the whole model, which --memory does not load"),
        ((*MEMORY, "--allocation", "query_heads"), "allocation query_heads needs the whole model, which --memory does not load"),
        ((*MEMORY, "--allocation", "layer_importance"), "choose global, uniform or per_layer"),
        ((*MEMORY, "--compensation", "least_square"), "did you mean 'least_squares'"),
        (("--resume",), "only what is read layer by layer can be resumed"),
    ],
)
def test_requests_that_make_no_sense(
    place: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], said: str
) -> None:
    assert said in refused(capsys, command(place, "prune", "out", *flags))
    assert names(place) == ["model", "text.txt"]


def test_a_model_is_not_replaced_by_what_is_made_of_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "config.json").write_text('{"model_type": "llama"}')
    before = contents(place)
    for output in ("model", "."):
        line = command(place, "prune", output, *MEMORY, "--overwrite")
        assert "would be replaced by the output: choose another" in refused(capsys, line)
    assert contents(place) == before


def test_a_disk_too_small_for_the_result_is_told_before_measuring(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = command(place, "prune", "out", *MEMORY)
    assert main([*command(place, "prune", "whole", *MEMORY), "--save-statistics", str(place / "statistics")]) == 0
    held = sum(path.stat().st_size for path in (place / "statistics").glob("layer-*"))
    weights = sum(path.stat().st_size for path in (place / "whole").glob("*.safetensors"))
    free = held + weights
    usage = shutil.disk_usage(place)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=free))
    # moments and weights would fit beside each other, the streams of both models not
    said = refused(capsys, line)
    assert "statistics, activations and the pruned weights need 0.00 GB more" in said and "make room" in said
    assert not [name for name in names(place) if name.startswith(".")]
    free = 3 * (held + weights)
    assert main(line) == 0


def test_the_text_counts_before_it_is_tokenized(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "text.txt").write_text(TEXT * 2_000)
    monkeypatch.setattr("hf_gqaprune.data.calibration.sample_windows", None)
    said = refused(capsys, command(place, "prune", "out", "--memory", "1GiB"))
    assert "the calibration text needs" in said
    tokens = len(TEXT) * 2_000
    assert float(said.partition("needs ")[2].partition("GiB")[0]) == pytest.approx((PROCESS + 362 * tokens) / 2**30, abs=0.02)


def test_sizes() -> None:
    assert [parse_size(text) for text in ("6GiB", "8GB", "512 mib", "1.5KiB", "7B")] == [6 << 30, 8 * 10**9, 1 << 29, 1536, 7]
    for text in ("", "GiB", "6", "6G", "6 apples", "6GiBs", "1e3GB", "nanGB", "0.1B", "6ib"):
        with pytest.raises(UsageError, match="is not a size"):
            parse_size(text)


def llama_3_8b(**changes: Any) -> Workload:
    shape = ModelShape(4096, 128256, False, False, False, "bfloat16", (LayerShape(32, 8, 14336, 128),) * 32)
    given = {"windows": 1, "seq_len": 2048, "measured": CRITERIA["curvature"], "refitted": True}
    return Workload(shape, 2, **(given | changes))


def test_a_gpu_that_cannot_hold_model_and_sums_is_told() -> None:
    shape, sums = llama_3_8b().shape, 32 * 4 * (4096**2 + 14336**2)
    weights = 2 * 8_030_261_248
    for rule, taken in (
        (CRITERIA["curvature"], weights + sums + 32 * 8 * 4096**2), (CRITERIA["wanda"], weights + sums), (None, weights)
    ):  # fmt: skip
        check_gpu_memory(shape, 2, rule, taken)
        with pytest.raises(UsageError, match=r"takes more than \d+\.\d\dGiB, and the GPU has .*GiB: --memory SIZE"):
            check_gpu_memory(shape, 2, rule, taken - 1)


def test_the_estimate_for_llama_3_8b() -> None:
    assert llama_3_8b().peak()[0] == "re-fitting a layer"
    assert 6 < llama_3_8b().peak()[1] / 2**30 < 8
    assert llama_3_8b(refitted=False).peak()[1] < llama_3_8b().peak()[1]
    # a window more is another batch, not a larger one
    assert llama_3_8b(windows=128).peak() == llama_3_8b().peak()
    # on a GPU it is a larger one, until the batch is full
    assert llama_3_8b(gpu=True).batch == 2048 and llama_3_8b(gpu=True, windows=3).batch == 3 * 2048
    assert llama_3_8b(gpu=True, windows=128).batch == 8192
    assert llama_3_8b().peak()[1] < llama_3_8b(gpu=True, windows=128).peak()[1] < 12 << 30


def test_what_memory_holds_needs_no_disk() -> None:
    shape, rule, windows = llama_3_8b().shape, CRITERIA["curvature"], Calibration(torch.zeros(128, 2048, dtype=torch.long))
    stream, moments = windows.tokens * 4096 * 2, moments_disk_bytes(shape, rule)
    whole = room(shape, torch.bfloat16, windows, rule)
    assert whole == 34 * stream + max(moments)
    assert room(shape, torch.bfloat16, windows, rule, held=20 * stream) == max(14 * stream + max(moments), sum(moments))
    assert room(shape, torch.bfloat16, windows, rule, held=whole) == sum(moments)
    assert streams_disk_bytes(windows.tokens, 4096, torch.bfloat16, held=4 * stream) == 2 * stream
    assert streams_disk_bytes(windows.tokens, 4096, torch.bfloat16, held=7 * stream) == 0
    assert memory_capacity(torch.device("cpu"), 1 << 40) == 0
    total, available = host_memory()
    assert 0 < available <= total and memory_capacity(torch.device("cuda"), 1 << 40) >= 1 << 40


def test_a_gpu_takes_more_windows_at_once_where_no_logits_are_made() -> None:
    ids = torch.arange(9 * 2048).view(9, 2048)
    on_cpu, on_gpu = (layer_batches(ids, 128256, torch.device(name)) for name in ("cpu", "cuda"))
    assert [len(batch) for batch in on_cpu] == [1] * 9 and [len(batch) for batch in on_gpu] == [4, 4, 1]
    assert torch.equal(torch.cat(on_gpu), ids)
    replay = llama_3_8b(measured=None, refitted=False)
    assert replay.peak() == ("the process", PROCESS)
