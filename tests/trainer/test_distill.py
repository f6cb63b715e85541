"""Distillation: the losses, the teacher's cache on disk, and blocks fitted one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.costs import full_divergence
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hf_gqaprune import make_plan, prune, recover
from hf_gqaprune.checkpoint import identity
from hf_gqaprune.errors import WorkError
from hf_gqaprune.models import top_log_probs
from hf_gqaprune.trainer.distill import losses


def test_slices_of_the_logits_give_the_same_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = torch.randn(11, 20, requires_grad=True), torch.randint(20, (11,))
    targets = top_log_probs(torch.randn(11, 20), 4)
    whole = losses(logits, labels, targets)
    whole_gradient = torch.autograd.grad(whole[0] + whole[1], logits)
    monkeypatch.setattr("hf_gqaprune.models.losses.LOGITS_AT_ONCE", 60)
    sliced = losses(logits, labels, targets)
    torch.testing.assert_close(sliced, whole)
    torch.testing.assert_close(torch.autograd.grad(sliced[0] + sliced[1], logits), whole_gradient)
    assert float(whole[0].detach()) == pytest.approx(float(F.cross_entropy(logits, labels, reduction="sum").detach()))


# --- in training

SETTINGS: dict[str, Any] = {"seq_len": 32, "max_tokens": 768, "batch_tokens": 256, "rank": 4, "learning_rate": 1e-2}


@pytest.fixture
def dense(tmp_path: Path, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Path:
    # as it is drawn, it predicts next to nothing, and a pruned one the same
    with torch.no_grad():
        for parameter in llama.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    llama.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def pruned(tmp_path: Path, dense: Path, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Path:
    plan = make_plan(model=llama, backbone_ratio=0.3, criterion="magnitude")
    prune(llama, plan, compensation="none").save_pretrained(tmp_path / "pruned")
    tokenizer.save_pretrained(tmp_path / "pruned")
    identity.write_identity(tmp_path / "pruned", fingerprint=identity.fingerprint(tmp_path / "pruned"), plan_hash=plan.hash())
    return tmp_path / "pruned"


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(" ".join(str(i * i) for i in range(400)))
    return str(tmp_path / "text.txt")


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    rows = [{"prompt": f"{i} times {i} is ", "completion": str(i * i)} for i in range(60)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "pairs.jsonl")


def log(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "training_log.json").read_text())


def test_the_first_loss_is_the_divergence_of_pruned_from_dense(
    dense: Path, pruned: Path, text: str, tmp_path: Path
) -> None:
    """Before the first update, on the rows of the first step, with everything kept of the teacher's logits."""
    from transformers import AutoModelForCausalLM

    settings = {**SETTINGS, "max_tokens": 256, "held_out_tokens": 0, "top_k": 259, "temperature": 2.0}
    out = recover(pruned, [text], tmp_path / "out", teacher=dense, distillation=0.75, **settings)
    (entry,) = log(out)["train"]
    assert entry["loss"] == pytest.approx(0.25 * entry["cross_entropy"] + 0.75 * entry["divergence"], rel=1e-5)

    from transformers import AutoTokenizer

    from hf_gqaprune.configuration import RecoveryConfig
    from hf_gqaprune.trainer.data import load_data

    config = RecoveryConfig.from_preset(data=[text], **settings)
    data = load_data(AutoTokenizer.from_pretrained(pruned), config, vocabulary=259, seed=0)
    ids = torch.tensor(data.train["input_ids"][:])
    with torch.no_grad():
        student = AutoModelForCausalLM.from_pretrained(pruned)(ids)
        teacher = AutoModelForCausalLM.from_pretrained(dense)(ids)
    expected = full_divergence(student.logits[:, :-1], teacher.logits[:, :-1], 2.0).mean()
    assert entry["divergence"] == pytest.approx(float(expected), rel=5e-3)


@pytest.mark.parametrize("kind", ["text", "pairs"])
def test_the_cache_on_disk_trains_as_the_teacher_in_memory(
    dense: Path, pruned: Path, text: str, pairs: str, tmp_path: Path, kind: str
) -> None:
    source = text if kind == "text" else pairs
    settings = {**SETTINGS, "epochs": 2, "distillation": 1.0, "top_k": 8, "teacher": dense}
    one = recover(pruned, [source], tmp_path / "memory", **settings)
    other = recover(pruned, [source], tmp_path / "disk", teacher_cache=True, **settings)
    first, second = log(one)["train"], log(other)["train"]
    assert len(first) == len(second) > 2
    for a, b in zip(first, second, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_a_full_gpu_says_which_settings_take_less(
    dense: Path, pruned: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No CPU has a memory of its own that is full: the error of a GPU is raised where it would be."""
    from hf_gqaprune.trainer.sft import RecoveryTrainer

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    settings = {**SETTINGS, "max_tokens": 256, "teacher": dense}
    with monkeypatch.context() as patched:
        patched.setattr(RecoveryTrainer, "compute_loss", full)
        for changes, ways in (
            ({}, "teacher_cache=true, or set quantize=4bit"),
            ({"teacher_cache": True, "method": "full"}, "method=lora"),
        ):
            told = rf"lower device_tokens \(4096\) or seq_len \(\d+\), or set {ways}, and start again"
            with pytest.raises(WorkError, match=rf"memory of cpu is full \(CUDA out of memory\): {told}"):
                recover(pruned, [text], tmp_path / "out", overwrite=True, **settings, **changes)
    assert recover(pruned, [text], tmp_path / "out", overwrite=True, **settings).is_dir()


def test_a_run_may_begin_block_by_block(dense: Path, pruned: Path, text: str, tmp_path: Path) -> None:
    settings = {**SETTINGS, "distillation": 1.0, "teacher": dense, "held_out_tokens": 64}
    plain = recover(pruned, [text], tmp_path / "plain", **settings)
    begun = recover(pruned, [text], tmp_path / "begun", blockwise_tokens=768, **settings)
    assert log(begun)["train"][0]["divergence"] < log(plain)["train"][0]["divergence"]
