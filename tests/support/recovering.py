"""What the tests of recovery share: a text, a pruned checkpoint with all that lies beside it, and its comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gqaprune import make_plan, prune
from hf_gqaprune.checkpoint import identity

#: 31 text windows of 32 tokens, 8 rows a step: three steps, of which each is written
SETTINGS: dict[str, Any] = {
    "seq_len": 32,
    "max_tokens": 768,
    "batch_tokens": 256,
    "rank": 4,
    "checkpoints": 3,
    "learning_rate": 1e-2,
}


def write_animals(folder: Path) -> str:
    """A text file of 1,600 letters; its path."""
    words = "the cat saw two dogs and a bird by the old mill".split()
    path = folder / "animals.txt"
    path.write_text(" ".join(words[(i * i) % len(words)] for i in range(400)), encoding="utf-8")
    return str(path)


def prune_to(dense: Path, folder: Path, ratio: float, dtype: torch.dtype = torch.float32) -> Path:
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype)
    plan = make_plan(model=model, backbone_ratio=ratio, criterion="magnitude")
    prune(model, plan, compensation="none").save_pretrained(folder)
    AutoTokenizer.from_pretrained(dense).save_pretrained(folder)
    identity.write_identity(folder, fingerprint=identity.fingerprint(folder), plan_hash=plan.hash())
    (folder / "recipe.yaml").write_text("model: dense\n")
    (folder / "LICENSE").write_text("a licence\n")
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal_weights(first: Path, second: Path) -> None:
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
