"""What Llama can do, a Llama with layers of unequal size can do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import token_ids
from torch.nn import functional as F
from transformers import DynamicCache, LlamaForCausalLM, StaticCache
from transformers.models.llama.configuration_llama import LlamaConfig

from hf_gqaprune import PrunedLlamaConfig, PrunedLlamaForCausalLM, PrunedLlamaForSequenceClassification

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "initializer_range": 0.3,
}
UNEVEN = {"1": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 10}, "3": {"skip": ["mlp"]}}
#: no attention in the first layer: a cache must not take its length from there
HEADLESS = UNEVEN | {"0": {"skip": ["attention"]}}
BOTH = pytest.mark.parametrize("layers", [UNEVEN, HEADLESS], ids=["uneven", "headless"])


def model(layers: Any = UNEVEN, **kwargs: Any) -> PrunedLlamaForCausalLM:
    torch.manual_seed(0)
    built = PrunedLlamaForCausalLM(PrunedLlamaConfig(**(SIZES | kwargs), per_layer_config=layers)).eval()
    built.generation_config.eos_token_id = None
    return built


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_equal_layers_compute_what_llama_computes(implementation: str, tied: bool, bias: bool) -> None:
    options = {"tie_word_embeddings": tied, "attention_bias": bias, "mlp_bias": bias}
    pruned = model(None, **options)
    llama = LlamaForCausalLM(LlamaConfig(**(SIZES | options))).eval()
    llama.load_state_dict(pruned.state_dict())
    for one in (pruned, llama):
        one.set_attn_implementation(implementation)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :3] = 0
    with torch.no_grad():
        for attention_mask in (None, mask):
            first = pruned(token_ids(), attention_mask=attention_mask).logits
            assert torch.equal(first, llama(token_ids(), attention_mask=attention_mask).logits)


@BOTH
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_changes_nothing(layers: Any, implementation: str, kind: str) -> None:
    lm = model(layers)
    lm.set_attn_implementation(implementation)
    ids = token_ids(2, 12)
    cache = DynamicCache(config=lm.config) if kind == "dynamic" else StaticCache(config=lm.config, max_cache_len=16)
    with torch.no_grad():
        whole = lm(ids, use_cache=False).logits
        chunks = [ids[:, :5], ids[:, 5:9], ids[:, 9:10], ids[:, 10:11], ids[:, 11:]]
        pieces = [lm(chunk, past_key_values=cache, use_cache=True).logits for chunk in chunks]
    assert cache.get_seq_length() == 12
    assert torch.allclose(torch.cat(pieces, dim=1), whole, atol=1e-5 * float(whole.abs().max()), rtol=0)


@BOTH
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static", "disable_compile": True}])
def test_generate_with_a_cache_equals_without(layers: Any, beams: int, cache: dict[str, Any]) -> None:
    lm = model(layers)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
    plain = lm.generate(token_ids(), use_cache=False, **options)
    assert plain.shape == (2, 18)
    assert torch.equal(lm.generate(token_ids(), **options, **cache), plain)


@BOTH
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_left_padded_batches_generate_what_single_prompts_do(layers: Any, implementation: str) -> None:
    lm = model(layers)
    lm.set_attn_implementation(implementation)
    prompts = [token_ids(1, length, seed=length)[0] for length in (4, 7, 11)]
    width = max(len(prompt) for prompt in prompts)
    ids = torch.stack([F.pad(prompt, (width - len(prompt), 0), value=2) for prompt in prompts])
    mask = torch.stack([F.pad(torch.ones_like(prompt), (width - len(prompt), 0)) for prompt in prompts])
    batch = lm.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    for prompt, row in zip(prompts, batch, strict=True):
        alone = lm.generate(prompt[None], max_new_tokens=8, do_sample=False)[0]
        assert row[width:].tolist() == alone[len(prompt) :].tolist()


@BOTH
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(layers: Any, reentrant: bool) -> None:
    lm = model(layers).train()
    ids = token_ids()

    def gradients() -> dict[str, torch.Tensor]:
        lm.zero_grad()
        lm(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}

    plain = gradients()
    lm.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert lm.is_gradient_checkpointing
    lm.enable_input_require_grads()
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys() == {name for name, _ in lm.named_parameters()}
    assert all(torch.equal(gradient, checkpointed[name]) for name, gradient in plain.items())


ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0},
    "yarn": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 500.0, "original_max_position_embeddings": 32},
    "longrope": {
        "rope_type": "longrope",
        "factor": 2.0,
        "rope_theta": 500.0,
        "short_factor": [1.0 + i / 10 for i in range(8)],
        "long_factor": [2.0 + i / 10 for i in range(8)],
        "original_max_position_embeddings": 32,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 2.0,
        "rope_theta": 500.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


@pytest.mark.parametrize("rope", list(ROPES))
def test_every_rope_type_computes_what_llama_computes(tmp_path: Any, rope: str) -> None:
    pruned = model(None, rope_parameters=ROPES[rope])
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=ROPES[rope])).eval()
    llama.load_state_dict(pruned.state_dict())
    ids = token_ids(1, 48)
    with torch.no_grad():
        expected = llama(ids).logits
        assert torch.equal(pruned(ids).logits, expected)
    pruned.save_pretrained(tmp_path)
    loaded = PrunedLlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.rope_parameters["rope_type"] == rope
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected)


@pytest.mark.parametrize("rope", list(ROPES))
def test_pruning_keeps_the_rope(rope: str) -> None:
    from hf_gqaprune import PruningPlan, prune

    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=ROPES[rope])).eval()
    kept = prune(llama, PruningPlan.keep_all(llama.config), compensation="none")
    ids = token_ids(1, 48)
    with torch.no_grad():
        assert torch.equal(kept(ids).logits, llama(ids).logits)


@pytest.mark.parametrize("head_dim", [2, 8, 64])
def test_head_dim_is_free(head_dim: int) -> None:
    lm = model(head_dim=head_dim)
    assert lm.model.layers[1].self_attn.q_proj.weight.shape == (2 * head_dim, 24)
    with torch.no_grad():
        assert bool(torch.isfinite(lm(token_ids()).logits).all())


def test_hidden_states_and_attentions_are_recorded() -> None:
    lm = model(HEADLESS)
    lm.set_attn_implementation("eager")
    with torch.no_grad():
        output = lm(token_ids(), output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 10, 24)] * 5
    assert [attention.shape[1] for attention in output.attentions] == [2, 6, 6]


def test_a_change_of_attention_reaches_every_layer() -> None:
    lm = model()
    for implementation in ("eager", "sdpa", "flex_attention"):
        lm.set_attn_implementation(implementation)
        assert {layer.self_attn.config._attn_implementation for layer in lm.model.layers} == {implementation}


def test_the_embeddings_can_be_resized() -> None:
    lm = model()
    with torch.no_grad():
        before = lm(token_ids()).logits
        lm.resize_token_embeddings(50)
        assert torch.equal(lm(token_ids()).logits[..., :48], before)


def test_a_classifier_reads_the_last_token_that_is_no_padding() -> None:
    torch.manual_seed(0)
    config = PrunedLlamaConfig(**SIZES, num_labels=3, per_layer_config=UNEVEN)
    classifier = PrunedLlamaForSequenceClassification(config).eval()
    ids = token_ids(1, 6)
    padded = F.pad(ids, (0, 4), value=2)
    with torch.no_grad():
        short = classifier(ids).logits
        long = classifier(padded, attention_mask=(padded != 2).long()).logits
    assert torch.allclose(short, long, atol=1e-5)


def test_compiled_without_a_graph_break() -> None:
    lm = model(HEADLESS)
    # the AOT backend traces everything and leaves out only the code generation
    compiled = torch.compile(lm, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = lm(token_ids(), use_cache=False).logits
        assert torch.allclose(compiled(token_ids(), use_cache=False).logits, expected, atol=1e-5)
