"""The checkpoint format: what a config may say, what a folder holds, what the Auto classes make of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import token_ids

from hf_gqaprune import (
    PrunedLlamaConfig,
    PrunedLlamaForCausalLM,
    PrunedLlamaForQuestionAnswering,
    PrunedLlamaForSequenceClassification,
    PrunedLlamaForTokenClassification,
    PrunedLlamaModel,
)
from hf_gqaprune.modeling_pruned_llama import AUTO_MAP

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
        (one(num_key_value_heads=0), 'num_key_value_heads must be a positive integer, got 0; to leave'),
        (one(num_attention_heads="4"), "layer 2: num_attention_heads must be a positive integer, got '4'"),
        (one(intermediate_size=8.0), "layer 2: intermediate_size must be a positive integer, got 8.0"),
        (one(intermediate_size=True), "layer 2: intermediate_size must be a positive integer, got True"),
        (one(intermediate_size=None), "layer 2: intermediate_size must be a positive integer, got None"),
        (one(intermediat_size=8), "layer 2: unknown key 'intermediat_size' (did you mean 'intermediate_size'?)"),
        (one(hidden_size=8), "layer 2: unknown key 'hidden_size'"),
        (one(skip=["atention"]), "layer 2: skip names 'atention' (did you mean 'attention'?); allowed: "),
        (one(skip="mlp"), "layer 2: skip must be a list out of attention, mlp, got 'mlp'"),
        (one(skip=[["mlp"]]), "layer 2: skip names ['mlp']"),
        ({str(i): {"skip": ["attention"]} for i in range(4)}, "attention is skipped in all 4 layers"),
    ],
)
def test_malformed_layers_are_refused(layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        config(layers)


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


def test_a_causal_lm_loads_as_backbone_and_as_classifier(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = PrunedLlamaForCausalLM(config()).eval()
    model.save_pretrained(tmp_path)
    backbone = transformers.AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(backbone(token_ids())[0], model.model(token_ids())[0])
    classifier, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert type(classifier) is PrunedLlamaForSequenceClassification
    assert set(info["missing_keys"]) == {"score.weight"}


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = PrunedLlamaForCausalLM(config(tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_the_plan_travels_with_the_weights(tmp_path: Path) -> None:
    model = PrunedLlamaForCausalLM(config())
    assert model.prune_plan is None
    model.save_pretrained(tmp_path / "bare")
    assert not (tmp_path / "bare" / "prune_plan.json").exists()
    assert PrunedLlamaForCausalLM.from_pretrained(tmp_path / "bare").prune_plan is None
    model.prune_plan = {"version": 1}
    model.save_pretrained(tmp_path / "planned")
    assert PrunedLlamaForCausalLM.from_pretrained(tmp_path / "planned").prune_plan == {"version": 1}


def test_device_map_and_dtype(tmp_path: Path) -> None:
    model = PrunedLlamaForCausalLM(config()).eval()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    offloaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        device_map={"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "lm_head": "disk"}
        | {"model.rotary_emb": "cpu"},
        offload_folder=tmp_path / "offload",
    )
    with torch.no_grad():
        assert torch.equal(offloaded(token_ids()).logits, model(token_ids()).logits)


ELSEWHERE = """
import sys
sys.modules["hf_gqaprune"] = None  # any import of it fails
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[1] + "/ids.pt")).logits, sys.argv[1] + "/logits.pt")
"""


def test_a_process_without_the_package_computes_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = PrunedLlamaForCausalLM(config()).eval()
    model.save_pretrained(tmp_path)
    torch.save(token_ids(), tmp_path / "ids.pt")
    subprocess.run([sys.executable, "-c", ELSEWHERE, str(tmp_path)], check=True, capture_output=True, timeout=60)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(token_ids()).logits)
