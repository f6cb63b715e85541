"""`prune_checkpoint` writes the files of `prune` and `save_pretrained`, byte for byte, however often it is interrupted."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.disk import contents, files_of_at_most
from support.tiny import tiny_config, tiny_llama, token_ids
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from hf_gqaprune import (
    Calibration,
    PrunedLlamaForCausalLM,
    PruningPlan,
    UsageError,
    WorkError,
    collect_statistics,
    make_plan,
    prune,
    prune_checkpoint,
)
from hf_gqaprune.checkpoint import identity, resolve_model
from hf_gqaprune.checkpoint import reader as shards
from hf_gqaprune.checkpoint.reader import INDEX, WEIGHTS
from hf_gqaprune.checkpoint.saving import write_checkpoint
from hf_gqaprune.models.shapes import ModelShape
from hf_gqaprune.plan import LayerPlan


def thinned(source: ModelShape, seed: int = 0, skip: tuple[tuple[int, str], ...] = ()) -> PruningPlan:
    """A plan that keeps about two thirds of the units, and nothing of the blocks in `skip`."""
    generator = torch.Generator().manual_seed(seed)

    def some(count: int, gone: bool) -> list[int]:
        keep = max(1, count * 2 // 3) if count and not gone else 0
        return torch.randperm(count, generator=generator)[:keep].tolist()

    layers = [
        LayerPlan.of_groups(
            shape, some(shape.kv_heads, (i, "attention") in skip), some(shape.ffn, (i, "mlp") in skip)
        )
        for i, shape in enumerate(source.layers)
    ]
    return PruningPlan(source, tuple(layers), attention_bias=source.attention_bias, mlp_bias=source.mlp_bias)


def plan_for(model: PreTrainedModel, seed: int = 0, skip: tuple[tuple[int, str], ...] = ()) -> PruningPlan:
    return thinned(ModelShape.from_config(model.config), seed, skip)


def in_memory(folder: Path, plan: PruningPlan, output: Path, max_shard_size: int | str = "50GB") -> dict[str, bytes]:
    """The files that loading, pruning and saving give."""
    pruned = prune(resolve_model(folder).load(), plan, compensation="none")
    whole = PruningPlan.from_dict(pruned.prune_plan)
    pruned.save_pretrained(output, max_shard_size=max_shard_size)
    weights = contents(output)
    shutil.rmtree(output)
    write_checkpoint(pruned, folder, output, plan_hash=whole.hash(), base_fingerprint=identity.fingerprint(folder))
    around = {name: data for name, data in contents(output).items() if not name.endswith(".safetensors")}
    shutil.rmtree(output)
    return {**weights, **around}


def saved(folder: Path, max_shard_size: int | str = "50GB", dtype: torch.dtype = torch.float32, **kwargs: Any) -> PreTrainedModel:
    model = tiny_llama(**kwargs).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_the_files_of_the_in_memory_path(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    root = tmp_path_factory.mktemp("stream")
    layers = data.draw(st.integers(1, 3))
    blocks = st.sampled_from([(i, kind) for i in range(layers) for kind in ("attention", "mlp")])
    skip = data.draw(st.sets(blocks, max_size=2).filter(lambda s: len([1 for _, kind in s if kind == "attention"]) < layers))
    model = saved(
        root / "dense",
        data.draw(st.sampled_from(["50GB", 9_000, 1_000])),
        data.draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32])),
        kv_heads=data.draw(st.integers(1, 3)),
        n_rep=data.draw(st.sampled_from([1, 2, 4])),
        layers=layers,
        attention_bias=data.draw(st.booleans()),
        mlp_bias=data.draw(st.booleans()),
        tie_word_embeddings=data.draw(st.booleans()),
    )
    plan = plan_for(model, data.draw(st.integers(0, 9)), tuple(skip))
    size = data.draw(st.sampled_from(["50GB", 20_000, 3_000]))
    before = contents(root / "dense")
    with pytest.MonkeyPatch.context() as patch:
        # a few rows at a time, as those of large models pass
        patch.setattr(shards, "_CHUNK", data.draw(st.sampled_from([1, 200, 1_000, shards._CHUNK])))
        assert prune_checkpoint(root / "dense", plan, root / "out", max_shard_size=size) == root / "out"
    assert contents(root / "out") == in_memory(root / "dense", plan, root / "memory", size)
    assert contents(root / "dense") == before
    assert sorted(path.name for path in root.iterdir()) == ["dense", "out"]


def test_eleven_layers_whose_names_do_not_sort_by_number(tmp_path: Path) -> None:
    model = saved(tmp_path / "dense", 5_000, layers=11)
    plan = plan_for(model)
    prune_checkpoint(tmp_path / "dense", plan, tmp_path / "out", max_shard_size=7_000)
    assert contents(tmp_path / "out") == in_memory(tmp_path / "dense", plan, tmp_path / "memory", 7_000)


def test_the_result_loads_and_speaks_as_the_in_memory_one(tmp_path: Path) -> None:
    model = saved(tmp_path / "dense", 9_000)
    plan = plan_for(model, skip=((1, "attention"),))
    prune_checkpoint(tmp_path / "dense", plan, tmp_path / "out", max_shard_size=5_000)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(loaded, PrunedLlamaForCausalLM)
    assert loaded.prune_plan == plan.to_dict()
    expected = prune(model, plan, compensation="none")
    assert torch.equal(loaded(token_ids()).logits, expected(token_ids()).logits)


def test_a_pruned_checkpoint_is_pruned_again(tmp_path: Path) -> None:
    model = saved(tmp_path / "dense", 9_000, dtype=torch.bfloat16, kv_heads=4, ffn=20, layers=3)
    first = plan_for(model, skip=((1, "mlp"),))
    prune_checkpoint(tmp_path / "dense", first, tmp_path / "once", max_shard_size=9_000)
    second = thinned(first.target, seed=1)
    prune_checkpoint(tmp_path / "once", second, tmp_path / "twice")
    assert contents(tmp_path / "twice") == in_memory(tmp_path / "once", second, tmp_path / "memory")
    assert PruningPlan.load(tmp_path / "twice" / "prune_plan.json") == first.compose(second)
    known = identity.read_identity(tmp_path / "twice")
    assert known is not None
    assert known["base_fingerprint"] == identity.fingerprint(tmp_path / "once")
    assert known["fingerprint"] == identity.fingerprint(tmp_path / "twice")
    prune_checkpoint(tmp_path / "dense", first.compose(second), tmp_path / "directly")
    assert (tmp_path / "directly" / WEIGHTS).read_bytes() == (tmp_path / "twice" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("declared", ["bfloat16", "float32", None])
def test_weights_become_what_the_config_says_else_stay_what_the_first_is(tmp_path: Path, declared: str | None) -> None:
    model = saved(tmp_path / "dense", dtype=torch.float16, tie_word_embeddings=True)
    weights = load_file(tmp_path / "dense" / WEIGHTS)
    norms = {name: tensor.float() for name, tensor in weights.items() if "norm" in name}
    # what older releases stored, which nothing reads
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "lm_head.weight": weights["model.embed_tokens.weight"] + 0}
    save_file({**weights, **norms, **extra}, tmp_path / "dense" / WEIGHTS, metadata={"format": "pt"})
    path = tmp_path / "dense" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": declared}))
    plan = plan_for(model)
    prune_checkpoint(tmp_path / "dense", plan, tmp_path / "out")
    expected = in_memory(tmp_path / "dense", plan, tmp_path / "memory")
    assert contents(tmp_path / "out") == expected
    found = {tensor.dtype for tensor in load_file(tmp_path / "out" / WEIGHTS).values()}
    assert found == {getattr(torch, declared or "float16")}


def test_what_lies_beside_the_weights_comes_along(tmp_path: Path, llama: PreTrainedModel, tokenizer: Any) -> None:
    dense = tmp_path / "dense"
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(dense)
    llama.generation_config = GenerationConfig(temperature=0.5, do_sample=True, eos_token_id=[1, 2])
    llama.save_pretrained(dense)
    (dense / "LICENSE.txt").write_text("terms")
    (dense / "optimizer.pt").write_text("not part of a model")
    save_file({"other": torch.ones(3)}, dense / "consolidated.safetensors")
    plan = plan_for(llama)
    prune_checkpoint(dense, plan, tmp_path / "out")
    assert contents(tmp_path / "out") == in_memory(dense, plan, tmp_path / "memory")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    assert GenerationConfig.from_pretrained(tmp_path / "out").temperature == 0.5
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "terms"
    assert not (tmp_path / "out" / "optimizer.pt").exists()


def test_the_disk_fills_up_at_any_layer_and_the_next_call_goes_on(tmp_path: Path) -> None:
    model = saved(tmp_path / "dense", layers=6, ffn=64)
    plan, out, working = plan_for(model), tmp_path / "out", tmp_path / ".out.unfinished"
    before = contents(tmp_path / "dense")
    prune_checkpoint(tmp_path / "dense", plan, tmp_path / "whole")
    size = (tmp_path / "whole" / WEIGHTS).stat().st_size
    finished = []
    for limit in range(size // 7, size, size // 7):
        with files_of_at_most(limit), pytest.raises(WorkError) as caught:
            prune_checkpoint(tmp_path / "dense", plan, out, resume=True)
        assert str(caught.value) == (
            f"cannot write {working / WEIGHTS}: File too large; what was finished is in {working}: "
            "pass --resume to go on, or delete it"
        )
        assert not out.exists() and not (working / "config.json").exists()
        finished.append(len(json.loads((working / "progress.json").read_text())["written"]))
    assert finished == sorted(finished) and len(set(finished)) > 3
    prune_checkpoint(tmp_path / "dense", plan, out, resume=True)
    assert contents(out) == contents(tmp_path / "whole")
    assert contents(tmp_path / "dense") == before
    assert not working.exists()


@pytest.fixture
def interrupted(tmp_path: Path) -> PruningPlan:
    """A plan by which `out` is half made from `dense`: layers 0 and 1 of 4 are finished. `whole` is what it becomes."""
    model = saved(tmp_path / "dense", layers=4, ffn=64)
    plan = plan_for(model)
    prune_checkpoint(tmp_path / "dense", plan, tmp_path / "whole")
    whole = tmp_path / "whole" / WEIGHTS
    with files_of_at_most(place_of(whole, "model.layers.1.self_attn.v_proj.weight")[1]), pytest.raises(WorkError):
        prune_checkpoint(tmp_path / "dense", plan, tmp_path / "out")
    written = json.loads((tmp_path / ".out.unfinished" / "progress.json").read_text())["written"]
    assert {name.split(".")[2] for name in written if "layers" in name} == {"0", "1"}
    return plan


def overwrite_keeping_time(path: Path, position: int, data: bytes) -> None:
    """Change bytes of `path` without a trace in its size and time."""
    state = path.stat()
    with path.open("r+b") as stream:
        stream.seek(position)
        stream.write(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def place_of(path: Path, name: str) -> tuple[int, int]:
    """First and last offset of a tensor in a safetensors file."""
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    first, last = json.loads(content[8:begin])[name]["data_offsets"]
    return begin + first, begin + last


LAYER_0 = "model.layers.0.mlp.up_proj.weight"


def test_what_was_finished_is_not_read_again(tmp_path: Path, interrupted: PruningPlan) -> None:
    dense = tmp_path / "dense" / WEIGHTS
    first, last = place_of(dense, LAYER_0)
    overwrite_keeping_time(dense, first, bytes(last - first))
    prune_checkpoint(tmp_path / "dense", interrupted, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_did_not_reach_the_disk_is_written_again(tmp_path: Path, interrupted: PruningPlan) -> None:
    half = tmp_path / ".out.unfinished" / WEIGHTS
    first, last = place_of(half, LAYER_0)
    overwrite_keeping_time(half, first + 8, bytes(16))
    prune_checkpoint(tmp_path / "dense", interrupted, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_shards_that_are_gone_are_written_again(tmp_path: Path, interrupted: PruningPlan) -> None:
    (tmp_path / ".out.unfinished" / WEIGHTS).unlink()
    prune_checkpoint(tmp_path / "dense", interrupted, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_interrupted_call_is_neither_dropped_nor_mixed_with_another(tmp_path: Path, interrupted: PruningPlan) -> None:
    dense, out, working = tmp_path / "dense", tmp_path / "out", tmp_path / ".out.unfinished"
    state = contents(working)
    with pytest.raises(UsageError, match="is of an interrupted call: pass --resume to go on with it, or delete it"):
        prune_checkpoint(dense, interrupted, out)
    other = thinned(interrupted.source, seed=5)
    with pytest.raises(UsageError, match="was begun with another plan: give the same one, or delete it to begin anew"):
        prune_checkpoint(dense, other, out, resume=True)
    with pytest.raises(UsageError, match="was begun with another max_shard_size"):
        prune_checkpoint(dense, interrupted, out, max_shard_size=9_000, resume=True)
    saved(tmp_path / "tuned", layers=4, ffn=64, seed=1)
    with pytest.raises(UsageError, match="was begun with another model"):
        prune_checkpoint(tmp_path / "tuned", interrupted, out, resume=True)
    assert contents(working) == state and not out.exists()
    prune_checkpoint(dense, other, out, overwrite=True)
    assert PruningPlan.load(out / "prune_plan.json") == other
    assert not working.exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1, "inputs": {}}', '{"version": 1, "inputs": [], "read": {}, "written": 3}'])
def test_a_progress_file_that_is_none(tmp_path: Path, interrupted: PruningPlan, text: str) -> None:
    (tmp_path / ".out.unfinished" / "progress.json").write_text(text)
    with pytest.raises(UsageError, match="progress.json is not readable, so nothing can be resumed: delete "):
        prune_checkpoint(tmp_path / "dense", interrupted, tmp_path / "out", resume=True)


def test_killed_at_once_and_resumed(tmp_path: Path) -> None:
    model = saved(tmp_path / "dense", layers=40, ffn=512, kv_heads=8, max_position_embeddings=64)
    plan = plan_for(model)
    plan.save(tmp_path / "plan.json")
    code = (
        "import sys, hf_gqaprune as gp; d = sys.argv[1]; "
        "gp.prune_checkpoint(d + '/dense', gp.PruningPlan.load(d + '/plan.json'), d + '/out', max_shard_size='1MB')"
    )
    progress = tmp_path / ".out.unfinished" / "progress.json"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.DEVNULL)
    while process.poll() is None and not (progress.exists() and "layers.0." in progress.read_text()):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    written = json.loads(progress.read_text())["written"]
    assert any("layers.0." in name for name in written) and "model.norm.weight" not in written
    prune_checkpoint(tmp_path / "dense", plan, tmp_path / "out", max_shard_size="1MB", resume=True)
    prune_checkpoint(tmp_path / "dense", plan, tmp_path / "whole", max_shard_size="1MB", resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def cut_off(folder: Path) -> None:
    path = folder / "model-00002-of-00004.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def lie(folder: Path) -> None:
    path = folder / "model-00002-of-00004.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.popitem()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def lose_a_shard(folder: Path) -> None:
    (folder / "model-00002-of-00004.safetensors").unlink()


def lose_a_tensor(folder: Path) -> None:
    name, path = "model.layers.1.mlp.up_proj.weight", None
    index = json.loads((folder / INDEX).read_text())
    path = folder / index["weight_map"].pop(name)
    (folder / INDEX).write_text(json.dumps(index))
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path)


def unlist_a_tensor(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    (folder / INDEX).write_text(json.dumps(index))


def reshape_a_tensor(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    path = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(path)
    save_file({**tensors, name: tensors[name].T.contiguous()}, path)


def quantize_a_tensor(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    path = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(path)
    save_file({**tensors, name: tensors[name].to(torch.int8)}, path)


def quantize_the_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))


def pickle(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80")


def lose_the_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_off, "is truncated, or its safetensors header corrupt: "),
        (lie, "model-00002-of-00004.safetensors: "),
        (lose_a_shard, "names model-00002-of-00004.safetensors, which is not there"),
        (lose_a_tensor, "config.json asks for model.layers.1.mlp.up_proj.weight, which no shard holds"),
        (unlist_a_tensor, "does not list model.layers.1.mlp.up_proj.weight, which is in model-0000"),
        (reshape_a_tensor, "model.layers.1.mlp.up_proj.weight is (32, 64), config.json makes it (64, 32)"),
        (quantize_a_tensor, "model.layers.1.mlp.up_proj.weight is torch.int8: give the checkpoint with the plain weights"),
        (quantize_the_config, "is quantized, and pruning, evaluation and recovery need the plain weights"),
        (pickle, "holds pickles (pytorch_model.bin), which are not read: convert them with python -c "),
        (lose_the_config, "holds no config.json"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused_in_one_line(tmp_path: Path, damage: Any, message: str) -> None:
    model = saved(tmp_path / "dense", 30_000, ffn=64)
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) == 4
    damage(tmp_path / "dense")
    before = contents(tmp_path / "dense")
    with pytest.raises(UsageError) as caught:
        prune_checkpoint(tmp_path / "dense", plan_for(model), tmp_path / "out")
    assert message in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert contents(tmp_path / "dense") == before
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_requests_that_make_no_sense(tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    plan = plan_for(saved(dense))
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="natural_gradient needs both models in memory: use prune"):
        prune_checkpoint(dense, plan, tmp_path / "out", compensation="natural_gradient")
    with pytest.raises(UsageError, match="unknown compensation 'nome' .did you mean 'none'"):
        prune_checkpoint(dense, plan, tmp_path / "out", compensation="nome")
    with pytest.raises(UsageError, match="the plan is for a model of 3 layers, this one has 2"):
        prune_checkpoint(dense, thinned(ModelShape.from_config(tiny_config(layers=3))), tmp_path / "out")
    with pytest.raises(UsageError, match="dense exists already"):
        prune_checkpoint(dense, plan, dense)
    with pytest.raises(UsageError, match="dense would be replaced by the output"):
        prune_checkpoint(dense, plan, dense, overwrite=True)
    with pytest.raises(UsageError, match="max_shard_size='big' is not a size"):
        prune_checkpoint(dense, plan, tmp_path / "out", max_shard_size="big")
    with pytest.raises(UsageError, match="no such model folder"):
        prune_checkpoint(tmp_path / "nowhere", plan, tmp_path / "out")
    assert contents(tmp_path) == before


def test_an_output_is_replaced_only_when_asked(tmp_path: Path) -> None:
    plan = plan_for(saved(tmp_path / "dense"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="out exists already: choose another output or pass --overwrite"):
        prune_checkpoint(tmp_path / "dense", plan, tmp_path / "out")
    with pytest.raises(UsageError, match="out is no checkpoint, adapter, "):
        prune_checkpoint(tmp_path / "dense", plan, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == {"notes.txt": b"mine"}
    (tmp_path / "out" / "config.json").write_text('{"model_type": "llama"}')
    prune_checkpoint(tmp_path / "dense", plan, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == in_memory(tmp_path / "dense", plan, tmp_path / "memory")


def test_too_little_room_is_told_before_any_work(tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    vocabulary = shutil.disk_usage(tmp_path).total // 32  # rows of 64 bytes: twice the disk, in a file that is a hole
    model = saved(dense)
    config = json.loads((dense / "config.json").read_text())
    width = config["hidden_size"]
    (dense / "config.json").write_text(json.dumps({**config, "vocab_size": vocabulary, "tie_word_embeddings": True}))
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        shape = [vocabulary, width] if name == "model.embed_tokens.weight" else list(tensor.shape)
        size = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with (dense / WEIGHTS).open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + offset)
    source = ModelShape.from_config(resolve_model(dense).config)
    with pytest.raises(UsageError, match=r"the pruned weights need \d+\.\d\d GB more, and .* has \d+\.\d\d GB left: make room"):
        prune_checkpoint(dense, thinned(source), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_the_command_replays_a_saved_plan_shard_by_shard(tmp_path: Path, tokenizer: Any) -> None:
    from hf_gqaprune.cli import main

    model = tiny_llama(layers=2)
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    plan = plan_for(model)
    plan.save(tmp_path / "plan.json")
    command = ["prune", str(tmp_path / "dense"), "--plan", str(tmp_path / "plan.json"), "-o", str(tmp_path / "cut")]
    assert main([*command, "--resume"]) == 2
    assert not (tmp_path / "cut").exists()
    # nothing is there to go on with: it begins
    assert main([*command, "--compensation", "none", "--resume"]) == 0
    cut, wanted = contents(tmp_path / "cut"), in_memory(tmp_path / "dense", plan, tmp_path / "again")
    known, of_memory = (json.loads(files.pop("gqaprune.json")) for files in (cut, wanted))
    assert cut == wanted
    # the command also notes what it was told
    assert known == {**of_memory, "calibration": [], "seed": 0, "compensation": "none"}


def test_statistics_are_used_unless_told_otherwise(tmp_path: Path) -> None:
    model = saved(tmp_path / "dense")
    statistics = collect_statistics(model, Calibration.from_ids(token_ids(9, 24)))
    plan = make_plan(statistics, backbone_ratio=0.3)
    for name, options in (("default", {}), ("named", {"compensation": "least_squares"}), ("none", {"compensation": "none"})):
        prune_checkpoint(tmp_path / "dense", plan, tmp_path / name, statistics, **options)
    first, second, third = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("default", "named", "none"))
    assert first == second != third
