"""The loopback Hub of these tests, through the real client: what goes up comes down."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    create_commit,
    create_repo,
    snapshot_download,
    upload_folder,
)
from support.hub_server import HubServer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

IDS = torch.tensor([[0, 74, 71, 78, 78, 81]])


def test_the_hub_keeps_commits_large_files_and_deletions(hub: HubServer, tmp_path: Path) -> None:
    large = os.urandom(200_000)  # goes up in parts
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "model.safetensors").write_bytes(large)
    (tmp_path / "in" / "sub" / "notes.txt").write_text("hello")
    create_repo("acme/files")
    first = upload_folder(repo_id="acme/files", folder_path=tmp_path / "in")
    operations = [CommitOperationDelete("sub/notes.txt"), CommitOperationAdd("new.txt", b"new")]
    create_commit("acme/files", operations, commit_message="second")
    assert sorted(HfApi().list_repo_files("acme/files")) == [".gitattributes", "model.safetensors", "new.txt"]
    old = Path(snapshot_download("acme/files", revision=first.oid))
    assert (old / "model.safetensors").read_bytes() == large
    assert (old / "sub" / "notes.txt").read_text() == "hello" and not (old / "new.txt").exists()
    assert (Path(snapshot_download("acme/files")) / "new.txt").read_text() == "new"


def test_the_hub_gives_a_private_repository_only_to_its_owner(
    hub: HubServer, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    llama.push_to_hub("acme/closed", private=True)
    tokenizer.push_to_hub("acme/closed")
    assert torch.equal(AutoModelForCausalLM.from_pretrained("acme/closed")(IDS).logits, llama(IDS).logits)
    assert AutoTokenizer.from_pretrained("acme/closed")("hello").input_ids == IDS[0].tolist()
    with pytest.raises(OSError, match="not a valid model identifier|gated|private"):
        AutoModelForCausalLM.from_pretrained("acme/closed", token="hf_of_somebody_else", force_download=True)
