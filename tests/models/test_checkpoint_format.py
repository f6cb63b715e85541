"""The checkpoint format: what a config may say, what a folder holds, what the Auto classes make of it."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import snapshot_download
from support.hub_server import HubServer
from support.tiny import token_ids

from hf_gqaprune import (
    PrunedLlamaConfig,
    PrunedLlamaForCausalLM,
    PrunedLlamaForQuestionAnswering,
    PrunedLlamaForSequenceClassification,
    PrunedLlamaForTokenClassification,
    PrunedLlamaModel,
)
from hf_gqaprune.models.modeling_pruned_llama import AUTO_MAP

LAYERS = {
    "0": {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 10},
    "1": {"skip": ["attention"]},
    "2": {"skip": ["mlp"], "num_attention_heads": 3, "num_key_value_heads": 1},
}


def config(layers: Any = LAYERS, **kwargs: Any) -> PrunedLlamaConfig:
    """Four layers of 6 query and 3 KV heads; the last one stays as the global values say."""
    defaults: dict[str, Any] = {
        "vocab_size": 48,
        "hidden_size": 24,
        "intermediate_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "initializer_range": 0.2,
        "num_labels": 3,
    }
    return PrunedLlamaConfig(**(defaults | kwargs), per_layer_config=layers)


def one(**sizes: Any) -> dict[str, Any]:
    return {"2": sizes}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([{}, {}], "must map layer indices to sizes, got a list of 2 entries for 4 layers"),
        ({"4": {}}, "names layer '4', the model has layers 0 to 3"),
        ({-1: {}}, "names layer -1, the model has layers 0 to 3"),
        ({"two": {}}, "names layer 'two', the model has layers 0 to 3"),
        ({True: {}}, "names layer True"),
        ({"2": [4, 2]}, "layer 2: per_layer_config must hold a mapping of sizes, got [4, 2]"),
        (one(num_attention_heads=4), "layer 2: num_attention_heads (4) is not a multiple of num_key_value_heads (3)"),
        (one(num_key_value_heads=4), "layer 2: num_attention_heads (6) is not a multiple of num_key_value_heads (4)"),
        (one(intermediate_size=-8), "layer 2: intermediate_size must be a positive integer, got -8"),
        (one(intermediate_size=0), 'got 0; to leave the block out use "skip": ["mlp"]'),
        (one(num_key_value_heads=0), "num_key_value_heads must be a positive integer, got 0; to leave"),
        (one(num_attention_heads="4"), "layer 2: num_attention_heads must be a positive integer, got '4'"),
        (one(intermediate_size=8.0), "layer 2: intermediate_size must be a positive integer, got 8.0"),
        (one(intermediate_size=True), "layer 2: intermediate_size must be a positive integer, got True"),
        (one(intermediate_size=None), "layer 2: intermediate_size must be a positive integer, got None"),
        (one(intermediat_size=8), "layer 2: unknown key 'intermediat_size' (did you mean 'intermediate_size'?)"),
        (one(hidden_size=8), "layer 2: unknown key 'hidden_size'"),
        (one(skip=["atention"]), "layer 2: skip names 'atention' (did you mean 'attention'?); allowed: "),
        (one(skip="mlp"), "layer 2: skip must be a list out of attention, mlp, got 'mlp'"),
        (one(skip=[["mlp"]]), "layer 2: skip names ['mlp']"),
        (one(skip=None), "layer 2: skip must be a list out of attention, mlp, got None"),
        (one(head_dim=4), "layer 2: unknown key 'head_dim'"),
        (one(num_attention_heads=2), "layer 2: num_attention_heads (2) is not a multiple of num_key_value_heads (3)"),
        ({"4": {"num_key_value_heads": 1}}, "names layer '4', the model has layers 0 to 3"),
        ({"²": {}}, "names layer '²', the model has layers 0 to 3"),
        ({"1.0": {}}, "names layer '1.0', the model has layers 0 to 3"),
        ({"2": {}, "02": {}}, "names layer 2 twice, the second time as '02'"),
        (7, "must map layer indices to sizes, got a int for 4 layers"),
        ({str(i): {"skip": ["attention"]} for i in range(4)}, "attention is skipped in all 4 layers"),
    ],
)
def test_malformed_layers_are_refused(layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        config(layers)
    assert "\n" not in str(caught.value)
    late = config(None)
    with pytest.raises(ValueError, match=re.escape(message)):
        late.per_layer_config = layers


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_key_value_heads": 4}, "layer 3: num_attention_heads (6) is not a multiple of num_key_value_heads (4)"),
        ({"intermediate_size": -16}, "layer 1: intermediate_size must be a positive integer, got -16"),
        ({"num_hidden_layers": 0}, "the model: num_hidden_layers must be a positive integer, got 0"),
        ({"num_attention_heads": 0}, "the model: num_attention_heads must be a positive integer, got 0"),
        (
            {"head_dim": None, "hidden_size": 26},
            "hidden_size (26) is not a multiple of num_attention_heads (6): set head_dim",
        ),
        ({"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries for 4 layers: leave it out"),
        (
            {"layer_types": ["full_attention"] * 4},
            "layer 1: layer_types says 'full_attention', per_layer_config makes it 'moe'",
        ),
        ({"layer_types": "moe"}, "layer_types follows from per_layer_config, got 'moe': leave it out"),
    ],
)
def test_malformed_global_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        config(**values)
    assert "\n" not in str(caught.value)


def test_layer_types_follow_from_what_is_skipped() -> None:
    some = config()
    assert some.layer_types == ["full_attention", "moe", "full_attention", "full_attention"]
    some.per_layer_config = {3: {"skip": ["attention", "mlp"]}}
    assert some.layer_types == ["full_attention", "full_attention", "full_attention", "moe"]
    some.per_layer_config = {3: {"skip": ["mlp"]}}
    assert not hasattr(some, "layer_types")
    assert "layer_types" not in config(None, layer_types=["full_attention"] * 4).to_dict()


def test_head_dim_is_always_stored(tmp_path: Path) -> None:
    config(head_dim=None).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["head_dim"] == 4


def test_configs_are_compared_and_copied() -> None:
    assert config() == config() == copy.deepcopy(config()) == pickle.loads(pickle.dumps(config()))
    assert config() != config(None) and config() != config(hidden_size=48)


def test_a_malformed_checkpoint_is_refused_on_loading(tmp_path: Path) -> None:
    PrunedLlamaModel(config()).save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    data["per_layer_config"]["0"]["num_key_value_heads"] = 3
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="layer 0: num_attention_heads \\(4\\) is not a multiple of .* \\(3\\)"):
        transformers.AutoModel.from_pretrained(tmp_path)


def test_a_size_the_layer_does_not_have_is_not_checked() -> None:
    """Global heads that do not divide do no harm where no layer uses them."""
    layers = {str(i): {"num_attention_heads": 4, "num_key_value_heads": 4} for i in range(4)}
    assert config(layers).per_layer_config[3].num_attention_heads == 4


def test_config_round_trip(tmp_path: Path) -> None:
    first = config()
    first.save_pretrained(tmp_path)
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(again) is PrunedLlamaConfig
    assert again.to_dict() | {"_name_or_path": ""} == first.to_dict()
    assert [layer.intermediate_size for layer in again.per_layer_config] == [10, 16, 16, 16]
    assert json.loads((tmp_path / "config.json").read_text())["num_key_value_heads"] == 3
    assert config({1: {"skip": ["attention"]}}).to_dict() == config({"1": {"skip": ["attention"]}}).to_dict()


def test_more_than_ten_layers_keep_their_places(tmp_path: Path) -> None:
    layers = {index: {"intermediate_size": 16 + index} for index in (2, 10, 11)}
    config(layers, num_hidden_layers=12).save_pretrained(tmp_path)
    widths = [layer.intermediate_size for layer in PrunedLlamaConfig.from_pretrained(tmp_path).per_layer_config]
    assert widths == [16, 16, 18, *[16] * 7, 26, 27]


def test_modules_have_the_sizes_of_their_layers() -> None:
    layers = PrunedLlamaModel(config()).layers
    assert layers[0].self_attn.k_proj.weight.shape == (2 * 8, 24)
    assert layers[0].self_attn.o_proj.weight.shape == (24, 4 * 8)
    assert layers[0].mlp.down_proj.weight.shape == (24, 10)
    assert layers[1].self_attn is None and not hasattr(layers[1], "input_layernorm")
    assert layers[2].mlp is None and not hasattr(layers[2], "post_attention_layernorm")
    assert layers[2].self_attn.q_proj.weight.shape == (3 * 8, 24)
    assert layers[3].mlp.gate_proj.weight.shape == (16, 24)


CLASSES = [
    ("AutoModel", PrunedLlamaModel),
    ("AutoModelForCausalLM", PrunedLlamaForCausalLM),
    ("AutoModelForSequenceClassification", PrunedLlamaForSequenceClassification),
    ("AutoModelForTokenClassification", PrunedLlamaForTokenClassification),
    ("AutoModelForQuestionAnswering", PrunedLlamaForQuestionAnswering),
]


#: what a causal LM's checkpoint does not hold for each of them
HEADS: list[set[str]] = [
    set(),
    set(),
    {"score.weight"},
    {"score.weight", "score.bias"},
    {"qa_outputs.weight", "qa_outputs.bias"},
]


@pytest.mark.parametrize(("auto_name", "model_class"), CLASSES)
def test_every_auto_class_saves_and_loads(tmp_path: Path, auto_name: str, model_class: Any) -> None:
    torch.manual_seed(0)
    model = getattr(transformers, auto_name).from_config(config()).eval()
    assert type(model) is model_class
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"] == AUTO_MAP
    assert saved["architectures"] == [model_class.__name__]
    for file in ("configuration_pruned_llama.py", "modeling_pruned_llama.py"):
        assert (tmp_path / file).is_file()
    loaded, info = getattr(transformers, auto_name).from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is model_class
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        first, second = model(token_ids()), loaded(token_ids())
    assert all(torch.equal(first[name], second[name]) for name in first if isinstance(first[name], torch.Tensor))


@pytest.mark.parametrize(
    ("auto_name", "head"), [(name, names) for (name, _), names in zip(CLASSES, HEADS, strict=True)]
)
def test_a_causal_lm_gives_every_class_its_backbone(tmp_path: Path, auto_name: str, head: set[str]) -> None:
    torch.manual_seed(0)
    model = PrunedLlamaForCausalLM(config()).eval()
    model.save_pretrained(tmp_path)
    loaded, info = getattr(transformers, auto_name).from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == head
    backbone = loaded if auto_name == "AutoModel" else loaded.model
    with torch.no_grad():
        assert torch.equal(backbone(token_ids())[0], model.model(token_ids())[0])


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = PrunedLlamaForCausalLM(config(tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


PLAN = {"version": 1}


def planned() -> PrunedLlamaForCausalLM:
    torch.manual_seed(0)
    model = PrunedLlamaForCausalLM(config()).eval()
    model.prune_plan = PLAN
    return model


def test_the_plan_travels_with_the_weights(tmp_path: Path) -> None:
    planned().save_pretrained(tmp_path)
    for auto_name, _ in CLASSES:
        assert getattr(transformers, auto_name).from_pretrained(tmp_path).prune_plan == PLAN
    again, _ = PrunedLlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert again.prune_plan == PLAN
    assert PrunedLlamaForCausalLM(config()).prune_plan is None


def test_a_plan_does_not_outlive_its_weights(tmp_path: Path) -> None:
    planned().save_pretrained(tmp_path)
    PrunedLlamaForCausalLM(config()).save_pretrained(tmp_path)
    assert not (tmp_path / "prune_plan.json").exists()
    assert PrunedLlamaForCausalLM.from_pretrained(tmp_path).prune_plan is None


def test_only_the_main_process_writes_the_plan(tmp_path: Path) -> None:
    planned().save_pretrained(tmp_path / "keyword", is_main_process=False)
    planned().save_pretrained(tmp_path / "position", False)
    assert not list(tmp_path.glob("*/*"))


def test_the_plan_lies_in_the_subfolder_and_beside_the_shards(tmp_path: Path) -> None:
    model = planned()
    model.save_pretrained(tmp_path / "inner", max_shard_size="4KB")
    assert len(list((tmp_path / "inner").glob("model-*.safetensors"))) > 1
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="inner")
    assert loaded.prune_plan == PLAN
    with torch.no_grad():
        assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)


def test_saving_to_the_hub_sends_the_plan(hub: HubServer, tmp_path: Path) -> None:
    planned().save_pretrained(tmp_path / "one-go", push_to_hub=True, repo_id="acme/one-go")
    assert json.loads(hub.files("acme/one-go")["prune_plan.json"]) == PLAN
    assert PrunedLlamaForCausalLM.from_pretrained("acme/one-go").prune_plan == PLAN
    assert PrunedLlamaForCausalLM.from_pretrained("acme/one-go", local_files_only=True).prune_plan == PLAN


def test_a_repository_without_a_plan_loads_online_and_offline(hub: HubServer, tmp_path: Path) -> None:
    PrunedLlamaForCausalLM(config()).push_to_hub("acme/no-plan")
    cache = {"cache_dir": tmp_path}
    snapshot_download("acme/no-plan", **cache)
    assert PrunedLlamaForCausalLM.from_pretrained("acme/no-plan", local_files_only=True, **cache).prune_plan is None
    assert PrunedLlamaForCausalLM.from_pretrained("acme/no-plan", **cache).prune_plan is None


def test_adapters_reach_layers_of_every_size_and_merge(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    planned().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(base, lora).eval()
    # attention in 3 layers, FFN in 3
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 3 * 4 + 3 * 3
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(token_ids()).logits
        through_adapter = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
        assert through_adapter.prune_plan == PLAN
        assert torch.equal(through_adapter(token_ids()).logits, expected)
        adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert type(merged) is PrunedLlamaForCausalLM and merged.prune_plan == PLAN
        assert torch.allclose(merged(token_ids()).logits, expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_saved_and_loaded_as_it_is(tmp_path: Path, dtype: torch.dtype) -> None:
    model = transformers.AutoModelForCausalLM.from_config(config(), dtype=dtype).eval()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    with torch.no_grad():
        assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)


def test_device_map_auto_splits_between_whole_layers(tmp_path: Path) -> None:
    model = planned()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map="auto", max_memory={"cpu": 40_000}, offload_folder=tmp_path / "offload"
    )
    layers = {name: device for name, device in loaded.hf_device_map.items() if name.startswith("model.layers.")}
    assert set(layers) == {f"model.layers.{index}" for index in range(4)} and "disk" in layers.values()
    with torch.no_grad():
        assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)


ELSEWHERE = """
import sys
sys.modules["hf_gqaprune"] = None  # any import of it fails
from pathlib import Path
import torch, transformers
folder = Path(sys.argv[1])
ids = torch.load(folder / "ids.pt")
for auto_name in sys.argv[2:]:
    auto = getattr(transformers, auto_name)
    model = auto.from_pretrained(folder / auto_name, trust_remote_code=True)
    assert model.prune_plan == {"version": 1}, model.prune_plan
    model.save_pretrained(folder / "again" / auto_name)
    with torch.no_grad():
        torch.save(model(ids)[0], folder / f"{auto_name}.pt")
"""


def test_a_process_without_the_package_computes_and_saves_the_same(tmp_path: Path) -> None:
    """`trust_remote_code` alone, for every class; what is saved there is the same checkpoint, model files included."""
    expected = {}
    for auto_name, model_class in CLASSES:
        torch.manual_seed(0)
        model = model_class(config()).eval()
        model.prune_plan = PLAN
        model.save_pretrained(tmp_path / auto_name)
        with torch.no_grad():
            expected[auto_name] = model(token_ids())[0]
    torch.save(token_ids(), tmp_path / "ids.pt")
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path), *expected]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stderr
    for auto_name, output in expected.items():
        assert torch.equal(torch.load(tmp_path / f"{auto_name}.pt"), output)
        first, again = tmp_path / auto_name, tmp_path / "again" / auto_name
        assert sorted(os.listdir(first)) == sorted(os.listdir(again))
        for file in first.iterdir():
            assert file.read_bytes() == (again / file.name).read_bytes(), file.name
