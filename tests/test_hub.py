"""Pushing: what is sent, what is refused, and that what arrives is the model that was saved, bit for bit."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCardData, create_repo
from safetensors.torch import load_file, save_file
from support.hub_server import TOKEN, HubServer
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_gqaprune import PrunedLlamaForCausalLM
from hf_gqaprune.checkpoint import resolve_model
from hf_gqaprune.cli import main
from hf_gqaprune.errors import UsageError, WorkError
from hf_gqaprune.hub import bundle, push, verify
from hf_gqaprune.model_cards.card import create_model_card
from hf_gqaprune.plan import LayerPlan, PruningPlan
from hf_gqaprune.surgery import pruned_config

IDS = torch.tensor([[0, 74, 71, 78, 78, 81], [0, 3, 200, 258, 5, 9]])
#: runs where hf_gqaprune cannot be imported: argv holds the repository and a file with the ids and logits of the saver
STRANGER = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_gqaprune":
            raise ModuleNotFoundError("No module named 'hf_gqaprune'")
sys.meta_path.insert(0, Absent())
try:
    import hf_gqaprune
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("hf_gqaprune can be imported here")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(2)
saved = torch.load(sys.argv[2], weights_only=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert torch.equal(model(saved["ids"]).logits, saved["logits"]), "logits differ"
assert AutoTokenizer.from_pretrained(sys.argv[1])("hello").input_ids == saved["ids"][0].tolist()
print(type(model).__module__, type(model).__name__)
"""


@pytest.fixture
def pruned(llama: LlamaForCausalLM) -> PrunedLlamaForCausalLM:
    """A random Llama like `llama` without two KV groups and 12 FFN channels of layer 1 and the FFN of layer 2."""
    plan = PruningPlan.keep_all(llama.config)
    first, second, third = plan.source.layers
    cut = (
        LayerPlan.of_groups(first, range(4), range(48)),
        LayerPlan.of_groups(second, (0, 3), range(36)),
        LayerPlan.of_groups(third, (1,), ()),
    )
    plan = replace(plan, layers=cut)
    model = PrunedLlamaForCausalLM(pruned_config(llama.config, plan)).eval()
    model.prune_plan = plan.to_dict()
    return model


@pytest.fixture
def checkpoint(pruned: PrunedLlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """`pruned` as a complete folder, its card included."""
    folder = tmp_path / "mini-pruned"
    pruned.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    create_model_card(folder, base_model="acme/mini", license="apache-2.0", name="acme/mini")
    return folder


def load_as_a_stranger(repo_id: str, model: Any, folder: Path) -> str:
    """Load `repo_id` in a process without hf_gqaprune; fail unless its logits are those of `model`, bit for bit."""
    with torch.no_grad():
        torch.save({"ids": IDS, "logits": model(IDS).logits}, folder / "saved.pt")
    environment = {**os.environ, "HF_HOME": str(folder / "home")}
    command = [sys.executable, "-P", "-c", STRANGER, repo_id, str(folder / "saved.pt")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_was_pushed_loads_bit_equal_where_the_package_is_absent(
    hub: HubServer, checkpoint: Path, pruned: PrunedLlamaForCausalLM, tmp_path: Path
) -> None:
    assert push(checkpoint, "acme/mini") == f"{hub.endpoint}/acme/mini"
    out = load_as_a_stranger("acme/mini", pruned, tmp_path)
    assert "transformers_modules" in out and "PrunedLlamaForCausalLM" in out


def test_push_to_hub_of_model_and_tokenizer_loads_bit_equal(
    hub: HubServer, pruned: PrunedLlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    pruned.push_to_hub("acme/direct")
    tokenizer.push_to_hub("acme/direct")
    assert "prune_plan.json" in hub.files("acme/direct")
    load_as_a_stranger("acme/direct", pruned, tmp_path)


def test_dry_run_asks_nothing_and_names_what_is_then_sent(hub: HubServer, checkpoint: Path) -> None:
    for name in ("optimizer.pt", "training_args.bin", "events.log", "checkpoint-10/model.safetensors"):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_bytes(b"private")
    (checkpoint / "adapter_model.safetensors").write_bytes(b"private")
    listing = push(checkpoint, "acme/mini", private=True, dry_run=True)
    assert not hub.requests and not hub.repos
    push(checkpoint, "acme/mini", private=True)
    received = {name: len(data) for name, data in hub.files("acme/mini").items() if name != ".gitattributes"}
    assert received == dict(bundle(checkpoint).files)
    lines = [line.split() for line in listing.splitlines() if line.startswith("  ")]
    assert {name: int(size.replace(",", "")) for size, name in lines[:-1]} == received
    assert lines[-1] == [f"{sum(received.values()):,}", "bytes", "in", str(len(received)), "files"]
    assert listing.splitlines()[-1] == (
        "left out: adapter_model.safetensors, checkpoint-10/, events.log, optimizer.pt, training_args.bin"
    )
    assert received.keys() >= {"config.json", "model.safetensors", "prune_plan.json", "README.md", "tokenizer.json"}
    assert received.keys() >= {"configuration_pruned_llama.py", "modeling_pruned_llama.py"}
    assert hub.repos["models/acme/mini"].private


def test_weights_of_an_earlier_push_do_not_stay(
    hub: HubServer, checkpoint: Path, pruned: PrunedLlamaForCausalLM
) -> None:
    (checkpoint / "model.safetensors").unlink()
    pruned.save_pretrained(checkpoint, max_shard_size="30KB")
    push(checkpoint, "acme/mini")
    assert len([name for name in hub.files("acme/mini") if name.endswith(".safetensors")]) > 1
    assert torch.equal(AutoModelForCausalLM.from_pretrained("acme/mini")(IDS).logits, pruned(IDS).logits)
    pruned.save_pretrained(checkpoint)
    (checkpoint / "model.safetensors.index.json").unlink()
    push(checkpoint, "acme/mini", commit_message="One file")
    assert [name for name in hub.files("acme/mini") if "safetensors" in name] == ["model.safetensors"]
    assert hub.repos["models/acme/mini"].messages[-1] == "One file"


def test_a_branch_is_created_and_leaves_main_alone(
    hub: HubServer, checkpoint: Path, pruned: PrunedLlamaForCausalLM
) -> None:
    address = push(checkpoint, "acme/mini", revision="half")
    assert address == f"{hub.endpoint}/acme/mini/tree/half"
    assert hub.files("acme/mini").keys() == {".gitattributes"}
    loaded = AutoModelForCausalLM.from_pretrained("acme/mini", revision="half")
    assert torch.equal(loaded(IDS).logits, pruned(IDS).logits)


def test_a_gated_model_says_where_its_terms_are(hub: HubServer, checkpoint: Path) -> None:
    push(checkpoint, "acme/mini")
    hub.repos["models/acme/mini"].gated = True
    with pytest.raises(UsageError, match=rf"acme/mini is gated: accept its terms at {hub.endpoint}/acme/mini, and log in"):
        resolve_model("acme/mini")


def test_private_is_kept_or_refused(hub: HubServer, checkpoint: Path) -> None:
    create_repo("acme/mini")
    with pytest.raises(UsageError, match="acme/mini exists and is public"):
        push(checkpoint, "acme/mini", private=True)
    assert hub.files("acme/mini").keys() == {".gitattributes"}


@pytest.mark.parametrize("status", [500, 0])
def test_an_interrupted_push_publishes_nothing_and_goes_on_where_it_stopped(
    hub: HubServer, checkpoint: Path, status: int
) -> None:
    hub.outage = ("/commit/", status)
    with pytest.raises(
        WorkError, match=r"push to acme/mini failed .*run `gqaprune push \S*mini-pruned acme/mini` again"
    ):
        push(checkpoint, "acme/mini")
    assert hub.files("acme/mini").keys() == {".gitattributes"}
    hub.outage = None
    hub.requests.clear()
    push(checkpoint, "acme/mini")
    assert "model.safetensors" in hub.files("acme/mini")
    assert not [request for request in hub.requests if request.startswith("PUT")]


# --- refused


def test_requests_that_make_no_sense(
    hub: HubServer, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for repo_id in ("", "a/b/c", "acme/", "acme/mini pruned", "acme/-mini", "acme/mini.git"):
        with pytest.raises(UsageError, match="is not a repository id: write ORG/NAME"):
            push(checkpoint, repo_id, dry_run=True)
    with pytest.raises(UsageError, match="no folder"):
        push(tmp_path / "absent", "acme/mini")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"is not a checkpoint: it has no config\.json"):
        push(tmp_path / "empty", "acme/mini")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UsageError, match="no Hub token: run `hf auth login` or set HF_TOKEN"):
        push(checkpoint, "acme/mini")
    assert not hub.requests
    with pytest.raises(UsageError, match="has no write access to acme/mini"):
        push(checkpoint, "acme/mini", token="hf_of_somebody_else")
    assert push(checkpoint, "acme/mini", token=TOKEN).endswith("/acme/mini")


def test_a_checkpoint_without_card_or_weights_is_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="is not a complete checkpoint: no weights"):
        push(checkpoint, "acme/mini", dry_run=True)
    (checkpoint / "README.md").unlink()
    with pytest.raises(UsageError, match=r"has no README\.md: write it with `gqaprune card"):
        push(checkpoint, "acme/mini", dry_run=True)


@pytest.mark.parametrize(
    ("license", "name", "rule"),
    [
        ("llama2", "mini-Llama-2", None),
        ("llama2", "mini", "must contain 'Llama'"),
        ("llama3", "Llama-3-8B-pruned", None),
        ("llama3", "Meta-Llama-3-8B-pruned", "must begin with 'Llama-3'"),
        ("llama3", "Llama-pruned", "must begin with 'Llama-3'"),
        ("llama3.1", "Llama-pruned", None),
        ("llama3.2", "tiny-Llama-3.2", "must begin with 'Llama'"),
        ("llama3.3", "llama-3.3", "must begin with 'Llama'"),
        ("apache-2.0", "mini", None),
    ],
)
def test_llama_licenses_ask_for_a_name(checkpoint: Path, license: str, name: str, rule: str | None) -> None:
    create_model_card(checkpoint, base_model="acme/mini", license=license, name=f"acme/{name}", overwrite=True)
    for file in ("LICENSE.txt", "USE_POLICY.md"):
        (checkpoint / file).write_text("terms")
    if rule is None:
        assert "LICENSE.txt" in push(checkpoint, f"acme/{name}", dry_run=True)
    else:
        with pytest.raises(UsageError, match=f"Community License: the name '{name}' {rule}$"):
            push(checkpoint, f"acme/{name}", dry_run=True)


def test_llama_licenses_ask_for_files(hub: HubServer, checkpoint: Path) -> None:
    create_model_card(checkpoint, base_model="acme/mini", license="llama3.1", name="acme/Llama-x", overwrite=True)
    with pytest.raises(
        UsageError, match=r"Llama 3\.1 Community License: the name 'x' .*; \S+ needs LICENSE, USE_POLICY "
    ):
        push(checkpoint, "acme/x")
    (checkpoint / "NOTICE").unlink()
    with pytest.raises(UsageError, match="needs LICENSE, USE_POLICY, NOTICE "):
        push(checkpoint, "acme/Llama-x")
    assert not hub.requests
    create_model_card(checkpoint, base_model="acme/mini", license="llama3.1", name="acme/Llama-x", overwrite=True)
    (checkpoint / "LICENSE").write_text("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT")
    (checkpoint / "USE_POLICY.md").write_text("policy")
    push(checkpoint, "acme/Llama-x")
    assert hub.files("acme/Llama-x").keys() >= {"LICENSE", "USE_POLICY.md", "NOTICE"}


def test_a_llama_license_is_found_where_the_card_does_not_name_it(checkpoint: Path) -> None:
    readme = checkpoint / "README.md"
    readme.write_text("---\nlicense: other\nlicense_name: llama3\n---\n")
    with pytest.raises(UsageError, match="Meta Llama 3 Community License"):
        push(checkpoint, "acme/mini", dry_run=True)
    readme.write_text("---\nbase_model: acme/mini\n---\n")
    (checkpoint / "LICENSE").write_text("META LLAMA 3 COMMUNITY LICENSE AGREEMENT\n")
    with pytest.raises(UsageError, match="Meta Llama 3 Community License"):
        push(checkpoint, "acme/mini", dry_run=True)
    (checkpoint / "LICENSE").unlink()
    readme.write_text("---\nbase_model: meta-llama/Llama-3.1-8B\nlicense: unknown\n---\n")
    with pytest.raises(UsageError, match=r"the licence of meta-llama/Llama-3\.1-8B is not known"):
        push(checkpoint, "acme/mini", dry_run=True)


@pytest.mark.parametrize(
    ("name", "repo_id", "wanted"),
    [
        (None, "acme/mini", "acme/mini"),
        ("mini", "acme/mini", "acme/mini"),
        ("acme/mini", "acme/other", "acme/other"),
        ("acme/mini", "other", "ORG/other"),
        ("mini", "mini", "ORG/mini"),
    ],
)
def test_a_card_that_loads_from_elsewhere_is_refused_with_the_way_out(
    hub: HubServer, checkpoint: Path, name: str | None, repo_id: str, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    create_model_card(checkpoint, base_model="acme/Tiny", license="mit", name=name, overwrite=True)
    command = f"gqaprune card {checkpoint} --base-model acme/Tiny --name {wanted} --overwrite --license mit"
    for flags in ([], ["--dry-run"]):
        assert main(["push", str(checkpoint), repo_id, *flags]) == 2
        said = f"README.md loads the model from '{name or 'mini-pruned'}', not from {repo_id}: run `{command}`\n"
        assert capsys.readouterr().err.endswith(said)
    assert not hub.requests
    assert main(shlex.split(command)[1:]) == 0
    assert push(checkpoint, repo_id, dry_run=True)
    # a card written by hand may say what it likes
    (checkpoint / "README.md").write_text('---\nlicense: mit\n---\nmodel = AutoModel.from_pretrained("their/own")\n')
    assert push(checkpoint, repo_id, dry_run=True)


def test_the_command_names_only_what_the_card_knows(checkpoint: Path, tmp_path: Path) -> None:
    (base := tmp_path / "base").mkdir()
    create_model_card(checkpoint, base_model=base, overwrite=True)
    with pytest.raises(UsageError, match=r"--base-model ID --name acme/other --overwrite`$"):
        push(checkpoint, "acme/other")
    stated = {"license": "other", "license_name": "acme", "license_link": "https://acme.test/l"}
    (base / "README.md").write_text(f"---\n{ModelCardData(**stated).to_yaml()}\n---\n")
    create_model_card(checkpoint, base_model=base, overwrite=True)
    with pytest.raises(UsageError, match=r"--base-model ID --name acme/other --overwrite`$"):
        push(checkpoint, "acme/other")


def test_a_tokenizer_that_the_card_loads_is_there(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    problem = "README.md loads a tokenizer, but there is none: save it beside the weights"
    assert verify(checkpoint) == [problem]
    with pytest.raises(UsageError, match=f"is not a complete checkpoint: {problem}"):
        push(checkpoint, "acme/mini", dry_run=True)
    (checkpoint / "README.md").write_text("---\nlicense: mit\n---\nThe tokenizer is that of acme/base.\n")
    assert verify(checkpoint) == []


def test_local_paths_are_not_published(hub: HubServer, checkpoint: Path) -> None:
    (checkpoint / "recipe.yaml").write_text("model: /data/models/mini\noutput: out\nprune: {ratio: 0.2}\n")
    with pytest.raises(UsageError, match=r"recipe\.yaml holds the local path '/data/models/mini' \(model\)"):
        push(checkpoint, "acme/mini")
    assert not hub.requests


# --- verify


def test_a_whole_checkpoint_has_no_problems(checkpoint: Path, llama: LlamaForCausalLM, tmp_path: Path) -> None:
    assert verify(checkpoint) == []
    llama.save_pretrained(tmp_path / "plain")
    assert verify(tmp_path / "plain") == []


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def overwrite(path: Path, start: bytes) -> None:
    path.write_bytes(start + path.read_bytes()[len(start) :])


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "truncated": (lambda f: truncate(f / "model.safetensors"), "model.safetensors is damaged"),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors is damaged"),
    "header lies": (lambda f: overwrite(f / "model.safetensors", b"\xff" * 8), "model.safetensors is damaged"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json is not a JSON object"),
    "other code": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(model_type="their_llama")),
        "config.json does not describe a model",
    ),
    "code": (lambda f: (f / "modeling_pruned_llama.py").unlink(), "auto_map names modeling_pruned_llama.py"),
    "no plan": (lambda f: (f / "prune_plan.json").unlink(), "no prune_plan.json"),
    "plan": (
        lambda f: edit_json(f / "prune_plan.json", lambda plan: plan["layers"][1].update(ffn_channels="0-34")),
        "layer 1: prune_plan.json leaves 4 query heads, 2 KV heads and FFN 35; config.json has 4 query heads, 2 KV ",
    ),
    "config": (
        lambda f: edit_json(f / "config.json", lambda c: c["per_layer_config"]["1"].update(intermediate_size=37)),
        "model.layers.1.mlp.down_proj.weight has shape (32, 36), in the model of config.json (32, 37)",
    ),
    "invalid config": (
        lambda f: edit_json(f / "config.json", lambda c: c["per_layer_config"]["1"].update(num_key_value_heads=3)),
        "config.json does not describe a model",
    ),
    "a tensor is missing": (
        lambda f: edit_weights(f / "model.safetensors", lambda t: t.pop("model.norm.weight")),
        "the weights lack model.norm.weight",
    ),
    "a tensor too many": (
        lambda f: edit_weights(f / "model.safetensors", lambda t: t.update(extra=torch.zeros(1))),
        "the weights contain extra",
    ),
    "unfinished write": (lambda f: (f / ".config.json.abcd1234").touch(), ".config.json.abcd1234 is left from"),
    "unfinished download": (lambda f: (f / "model.safetensors.incomplete").touch(), "model.safetensors.incomplete is"),
    "two checkpoints": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "both model.safetensors and"),
    "pickles": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "the weights are pickles: save them as safetensors",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(checkpoint: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    damage(checkpoint)
    problems = verify(checkpoint)
    assert problems and problems[0].startswith(message), problems


def test_damaged_shards_are_named(checkpoint: Path, pruned: PrunedLlamaForCausalLM) -> None:
    (checkpoint / "model.safetensors").unlink()
    pruned.save_pretrained(checkpoint, max_shard_size="30KB")
    assert verify(checkpoint) == []
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    first, last = sorted(set(index["weight_map"].values()))[:: len(set(index["weight_map"].values())) - 1]
    shutil.copy(checkpoint / first, checkpoint / last)
    missing = {name for name, file in index["weight_map"].items() if file == last}
    assert verify(checkpoint) == [
        f"model.safetensors.index.json places {name} in {last}, which lacks it" for name in sorted(missing)
    ]
    (checkpoint / last).unlink()
    assert verify(checkpoint) == [f"model.safetensors.index.json names {last}, which is missing"]


def test_an_index_cannot_reach_outside_the_folder(checkpoint: Path) -> None:
    (checkpoint.parent / "secret.safetensors").write_bytes(b"secret")
    weight_map = {"a": "../secret.safetensors", "b": str(checkpoint.parent / "secret.safetensors")}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert not [name for name, _ in bundle(checkpoint).files if "secret" in name]
    for content in ("[]", '{"weight_map": [1, 2]}', '{"weight_map": {"a": 1}}'):
        (checkpoint / "model.safetensors.index.json").write_text(content)
        assert "1" not in dict(bundle(checkpoint).files) and verify(checkpoint)
