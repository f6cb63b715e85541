"""Checkpoints as people bring them, in memory and streamed alike."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import tiny_config, tiny_llama, token_ids
from transformers import AutoModelForCausalLM

from hf_gqaprune import (
    Calibration,
    PruningPlan,
    UsageError,
    WorkError,
    collect_statistics,
    make_plan,
    prune,
    prune_checkpoint,
    stream_statistics,
)
from hf_gqaprune.checkpoint import resolve_model, write_identity
from hf_gqaprune.cli import main
from hf_gqaprune.models import ModelShape, assemble, config_of_layers
from hf_gqaprune.utils import new_folder

WEIGHTS = "model.safetensors"
#: a SentencePiece model with the piece `<unk>` alone
PIECES = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """A checkpoint whose config ties the embeddings."""
    tiny_llama(tiny_config(tie_word_embeddings=True)).save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


def restore(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def test_a_different_head_unties_the_embeddings(tied: Path, tmp_path: Path) -> None:
    weights = load_file(tied / WEIGHTS)
    restore(tied, {**weights, HEAD: torch.randn_like(weights[EMBEDDINGS])})
    folder, loaded = resolve_model(tied), AutoModelForCausalLM.from_pretrained(tied)
    ids, windows = token_ids(), Calibration.from_ids(token_ids(9, 16))
    expected = loaded(ids).logits
    # made of a config that still says tied
    plan = PruningPlan.keep_all(loaded.config)
    assert torch.equal(prune(loaded, plan, compensation="none")(ids).logits, expected)
    assert torch.equal(folder.load()(ids).logits, expected)
    streamed = resolve_model(prune_checkpoint(tied, plan, tmp_path / "out")).load()
    assert torch.equal(streamed(ids).logits, expected) and not streamed.config.tie_word_embeddings
    assert ModelShape.from_config(folder.config).cost.parameters == streamed.num_parameters()
    statistics = [
        collect_statistics(folder.load(), windows, criterion="curvature"),
        stream_statistics(tied, windows, tmp_path / "statistics", criterion="curvature"),
    ]
    assert statistics[0].source == statistics[1].source
    plans = [make_plan(one, backbone_ratio=0.3) for one in statistics]
    assert plans[0] == plans[1] and plans[0].before.parameters == streamed.num_parameters()


def test_an_equal_head_stays_tied(tied: Path, tmp_path: Path) -> None:
    weights = load_file(tied / WEIGHTS)
    restore(tied, {**weights, HEAD: weights[EMBEDDINGS].clone()})
    assert resolve_model(tied).config.tie_word_embeddings
    out = prune_checkpoint(tied, PruningPlan.keep_all(resolve_model(tied).config), tmp_path / "out")
    assert HEAD not in load_file(out / WEIGHTS)


def test_tied_embeddings_may_be_stored_as_the_head(tied: Path, tmp_path: Path) -> None:
    shutil.copytree(tied, tmp_path / "head")
    weights = load_file(tied / WEIGHTS)
    restore(tmp_path / "head", {(HEAD if name == EMBEDDINGS else name): tensor for name, tensor in weights.items()})
    plan = PruningPlan.keep_all(resolve_model(tied).config)
    written = [prune_checkpoint(tmp_path / name, plan, tmp_path / f"out-{name}") / WEIGHTS for name in ("tied", "head")]
    assert written[0].read_bytes() == written[1].read_bytes()
    pruned = prune(resolve_model(tmp_path / "head").load(), plan, compensation="none")
    assert torch.equal(pruned.lm_head.weight, weights[EMBEDDINGS])


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("base", [False, True])
def test_an_adapter_is_refused_with_the_command_that_merges_it(tied: Path, tmp_path: Path, base: bool, ours: bool) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(resolve_model(tied).load(), LoraConfig(r=2, target_modules=["q_proj"]))
    folder = tied if base else tmp_path / "adapter"
    model.save_pretrained(folder)
    if ours:
        write_identity(folder, base_fingerprint="0")
    plan = PruningPlan.keep_all(model.config)
    command = f"gqaprune merge {folder} -o {folder}-merged" if ours else "AutoPeftModelForCausalLM"
    for call in (
        lambda: resolve_model(folder),
        lambda: prune_checkpoint(folder, plan, tmp_path / "out"),
        lambda: stream_statistics(folder, None, tmp_path / "out", criterion="magnitude"),
        lambda: make_plan(model=folder, ratio=0.1),
    ):
        with pytest.raises(UsageError, match=re.escape(f"{folder} holds a LoRA adapter: merge it first: ") + f".*{command}"):
            call()
    for call in (
        lambda: prune(model, plan, compensation="none"),
        lambda: make_plan(model=model, ratio=0.1),
        lambda: collect_statistics(model, criterion="magnitude", moments=False),
    ):
        with pytest.raises(UsageError, match="holds a LoRA adapter: merge it first"):
            call()
    assert not (tmp_path / "out").exists()


def test_an_index_needs_no_metadata(tied: Path, tmp_path: Path) -> None:
    model = resolve_model(tied).load()
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    index = tmp_path / "shards" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))
    loaded = resolve_model(tmp_path / "shards").load()
    assert loaded.name_or_path == str(tmp_path / "shards")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    plan = PruningPlan.keep_all(loaded.config)
    out = prune_checkpoint(tmp_path / "shards", plan, tmp_path / "out")
    assert torch.equal(resolve_model(out).load()(token_ids()).logits, model(token_ids()).logits)


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
def test_a_sentencepiece_tokenizer_names_the_library_it_needs(dense: Path) -> None:
    (dense / "tokenizer.json").unlink()
    (dense / "tokenizer.model").write_bytes(PIECES)
    (dense / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(UsageError, match=r"tokenizer\.model needs sentencepiece, which is not installed: pip install sentencepiece"):
        _ = resolve_model(dense).tokenizer


def test_a_left_over_quantization_config_is_refused_in_one_line(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("one two three four " * 40)
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    for line in (["eval", str(dense)], ["recover", str(dense), "-o", str(tmp_path / "out")]):
        assert main([*line, "--data", str(tmp_path / "text.txt"), "--seq-len", "32"]) == 2
        message = capsys.readouterr().err
        assert "is quantized" in message and message.count("\n") == 1


def test_weights_of_other_shapes_than_the_config_are_refused(tied: Path, tmp_path: Path) -> None:
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps({**config, "intermediate_size": 16}))
    plan = PruningPlan.keep_all(resolve_model(tied).config)
    for call in (resolve_model(tied).check_weights, lambda: prune_checkpoint(tied, plan, tmp_path / "out")):
        with pytest.raises(UsageError, match=r"_proj.weight is \(\d+, \d+\), config.json makes it"):
            call()


def test_a_weight_that_is_not_finite_is_named_also_where_nothing_is_fitted(tied: Path, tmp_path: Path) -> None:
    weights = load_file(tied / WEIGHTS)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    restore(tied, weights)
    plan = PruningPlan.keep_all(resolve_model(tied).config)
    message = "mlp.up_proj.weight holds values that are not finite; repair the checkpoint first"
    with pytest.raises(WorkError, match=message):
        prune(resolve_model(tied).load(), plan, compensation="none")
    with pytest.raises(WorkError, match=message):
        prune_checkpoint(tied, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_result_shares_nothing_with_its_input(tied: Path) -> None:
    model = resolve_model(tied).load()
    pruned = prune(model, PruningPlan.keep_all(model.config), compensation="none")
    pruned.generation_config.max_new_tokens = 7
    assert model.generation_config.max_new_tokens is None


def test_a_missing_weight_is_not_left_without_values(tied: Path) -> None:
    model = resolve_model(tied).load()
    config = config_of_layers(model.config, ModelShape.from_config(model.config).layers)
    state = {name: tensor for name, tensor in model.state_dict().items() if "norm" not in name and name != HEAD}
    with pytest.raises(RuntimeError, match="Missing key"):
        assemble(model, config, state)


def test_what_a_killed_process_left_is_removed_by_the_next_call(tmp_path: Path) -> None:
    code = "import os, sys; from hf_gqaprune.utils import new_folder\nwith new_folder(sys.argv[1]) as f:\n os.kill(os.getpid(), 15)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")]).returncode == -15
    assert any(tmp_path.iterdir())
    with new_folder(tmp_path / "out") as scratch:
        (scratch / "file").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
