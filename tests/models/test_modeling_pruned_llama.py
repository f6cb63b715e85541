"""What Llama can do, a Llama with layers of unequal size can do."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import token_ids
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
#: what the installed transformers calls a cache: the name changed in 5.24
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
BOTH = pytest.mark.parametrize("layers", [UNEVEN, HEADLESS], ids=["uneven", "headless"])


def model(layers: Any = UNEVEN, **kwargs: Any) -> PrunedLlamaForCausalLM:
    torch.manual_seed(0)
    built = PrunedLlamaForCausalLM(PrunedLlamaConfig(**(SIZES | kwargs), per_layer_config=layers)).eval()
    built.generation_config.eos_token_id = None
    return built


def dense_twin(pruned: PrunedLlamaForCausalLM) -> LlamaForCausalLM:
    """The stock Llama of the global sizes that computes what `pruned` computes: what a layer lacks has zero weights.

    A layer's first query head of a KV group becomes the first of that group in the dense layer, and so on; its biases
    and norms come along, and the output of a skipped block is zero, its bias included.
    """
    config, sizes = pruned.config, pruned.config.per_layer_config
    values = {name: value for name, value in config.to_dict().items() if name in LlamaConfig().to_dict()}
    dense = LlamaForCausalLM(LlamaConfig(**values)).eval()
    head_dim, repeats = config.head_dim, values["num_attention_heads"] // values["num_key_value_heads"]
    state = {}
    for name, target in dense.state_dict().items():
        state[name] = torch.zeros_like(target) if ".layers." in name and "norm" not in name else target
    for name, weight in pruned.state_dict().items():
        if ".layers." not in name or "norm" in name:
            state[name] = weight
            continue
        layer = sizes[int(name.split(".")[2])]
        if ".mlp." in name:
            rows = torch.arange(layer.intermediate_size)
        else:
            own, kept = layer.num_attention_heads // layer.num_key_value_heads, layer.num_key_value_heads
            kv = "k_proj" in name or "v_proj" in name
            heads = [g if kv else g * repeats + r for g in range(kept) for r in range(1 if kv else own)]
            rows = (torch.tensor(heads)[:, None] * head_dim + torch.arange(head_dim)).flatten()
        if not name.endswith(("o_proj.weight", "down_proj.weight", "o_proj.bias", "down_proj.bias")):
            state[name][rows] = weight
        elif name.endswith("weight"):
            state[name][:, rows] = weight
        else:
            state[name] = weight
    dense.load_state_dict(state)
    return dense


def randomize(lm: PrunedLlamaForCausalLM) -> PrunedLlamaForCausalLM:
    """Biases and norms, which start at 0 and 1, get values of their own."""
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return lm


def assert_computes_the_same(lm: Any, twin: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    with torch.no_grad():
        ours, theirs = (one(ids, attention_mask=mask, use_cache=False).logits for one in (lm, twin))
    if mask is not None:
        ours, theirs = ours[mask.bool()], theirs[mask.bool()]
    assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())


# the same draws every time: float32 rounding alone, amplified by random weights, reaches 1e-5 once in thousands of them
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_layers_of_any_size_compute_what_their_dense_twin_computes(data: st.DataObject) -> None:
    """n_rep, KV heads, FFN width and skips drawn layer by layer, biases, tying, head width, attention and padding."""
    kv_heads, repeats, width = (
        data.draw(st.integers(1, top), label) for top, label in ((3, "kv"), (4, "n_rep"), (9, "ffn"))
    )
    layers: dict[int, dict[str, Any]] = {}
    for index in range(3):
        kept = data.draw(st.integers(1, kv_heads))
        layers[index] = {
            "num_attention_heads": kept * data.draw(st.integers(1, repeats)),
            "num_key_value_heads": kept,
            "intermediate_size": data.draw(st.integers(1, width)),
            "skip": data.draw(st.sets(st.sampled_from(["mlp"] if index == 2 else ["attention", "mlp"]))),
        }
    # hidden_size is a multiple of the heads only because the stock Llama wants it
    lm = model(
        layers,
        num_hidden_layers=3,
        num_key_value_heads=kv_heads,
        num_attention_heads=kv_heads * repeats,
        intermediate_size=width,
        hidden_size=12 * kv_heads * repeats if kv_heads * repeats < 5 else 4 * kv_heads * repeats,
        head_dim=data.draw(st.sampled_from([2, 8, 32])),
        attention_bias=data.draw(st.booleans()),
        mlp_bias=data.draw(st.booleans()),
        tie_word_embeddings=data.draw(st.booleans()),
    )
    twin = dense_twin(randomize(lm))
    implementation = data.draw(st.sampled_from(["eager", "sdpa"]))
    for one in (lm, twin):
        one.set_attn_implementation(implementation)
    assert_computes_the_same(lm, twin, token_ids())
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :3] = 0
    assert_computes_the_same(lm, twin, token_ids(), mask)
    with torch.no_grad():
        ours, theirs = (one.double()(token_ids(), use_cache=False).logits for one in (lm, twin))
    assert float((ours - theirs).abs().max()) <= 1e-12 * float(theirs.abs().max())


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
        pieces = [lm(chunk, **{CACHE: cache}, use_cache=True).logits for chunk in chunks]
    assert cache.get_seq_length() == 12
    assert torch.allclose(torch.cat(pieces, dim=1), whole, atol=1e-5 * float(whole.abs().max()), rtol=0)


@BOTH
def test_a_cache_that_was_made_without_a_config_changes_nothing(layers: Any) -> None:
    lm, ids, cache = model(layers), token_ids(2, 12), DynamicCache()
    with torch.no_grad():
        whole = lm(ids, use_cache=False).logits
        pieces = [lm(chunk, **{CACHE: cache}, use_cache=True).logits for chunk in ids.split([5, 6, 1], dim=1)]
        # the fourth positional argument of a Llama is the cache, too
        unnamed = lm.lm_head(lm.model(ids, None, None, DynamicCache())[0])
    assert cache.get_seq_length() == 12
    assert torch.allclose(unnamed, whole, atol=1e-5 * float(whole.abs().max()), rtol=0)
    assert torch.allclose(torch.cat(pieces, dim=1), whole, atol=1e-5 * float(whole.abs().max()), rtol=0)


def test_a_cache_holds_what_each_layer_needs() -> None:
    lm = model(HEADLESS)
    cache = lm(token_ids(2, 12), use_cache=True)[CACHE]
    assert [None if layer.keys is None else tuple(layer.keys.shape) for layer in cache.layers[1:]] == [
        (2, kv_heads, 12, 16) for kv_heads in (1, 3, 3)
    ]
    assert getattr(cache.layers[0], "keys", None) is None


def test_speculative_decoding_changes_nothing() -> None:
    lm, ids = model(), token_ids(1, 12)
    options = {"max_new_tokens": 8, "do_sample": False}
    plain = lm.generate(ids, **options)
    assert torch.equal(lm.generate(ids, prompt_lookup_num_tokens=2, **options), plain)
    assert torch.equal(lm.generate(ids, assistant_model=model({"0": {"skip": ["mlp"]}}), **options), plain)


def test_packed_sequences_do_not_see_each_other() -> None:
    lm, first, second = model(HEADLESS), token_ids(1, 5), token_ids(1, 7, seed=1)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with torch.no_grad():
        packed = lm(torch.cat([first, second], dim=1), position_ids=positions, use_cache=False).logits
        alone = torch.cat([lm(first).logits, lm(second).logits], dim=1)
    assert torch.allclose(packed, alone, atol=1e-5 * float(alone.abs().max()), rtol=0)


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
    """In layers of equal and of unequal heads, inside and beyond the length that the rope was made for."""
    for layers in (None, HEADLESS):
        pruned = model(layers, rope_parameters=ROPES[rope])
        pruned.save_pretrained(tmp_path)
        loaded = PrunedLlamaForCausalLM.from_pretrained(tmp_path)
        assert loaded.config.rope_parameters["rope_type"] == rope
        twin = dense_twin(pruned)
        for length in (20, 48, 80, 20):
            ids = token_ids(1, length)
            assert_computes_the_same(pruned, twin, ids)
            with torch.no_grad():
                assert torch.equal(loaded(ids).logits, pruned(ids).logits)


def test_rope_fields_of_older_checkpoints_are_understood() -> None:
    theta, scaling = 500.0, {key: value for key, value in ROPES["llama3"].items() if key != "rope_theta"}
    old = PrunedLlamaConfig(**SIZES, per_layer_config=UNEVEN, rope_theta=theta, rope_scaling=scaling)
    assert old.rope_parameters == ROPES["llama3"]


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


def test_flash_and_flex_attention_and_tensor_parallelism_are_offered_as_for_llama() -> None:
    lm, llama = model(HEADLESS), LlamaForCausalLM(LlamaConfig(**SIZES))
    for flag in ("_supports_flash_attn", "_supports_sdpa", "_supports_flex_attn", "_supports_attention_backend"):
        assert getattr(lm, flag) is True
    assert lm._can_compile_fullgraph and lm.supports_gradient_checkpointing
    assert lm.tp_plan == llama.tp_plan and lm.tp_plan
    assert lm.pp_plan == llama.pp_plan


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
    """Without a cache, and prefill and decoding with a static one; this backend runs the traced graph as it is."""
    lm, ids = model({"0": {"skip": ["attention"]}, "1": UNEVEN["1"]}, num_hidden_layers=2), token_ids()
    compiled = torch.compile(lm, backend="eager", fullgraph=True)
    cache = StaticCache(config=lm.config, max_cache_len=16)
    with torch.no_grad():
        expected = lm(ids, use_cache=False).logits
        assert torch.allclose(compiled(ids, use_cache=False).logits, expected, atol=1e-5)
        pieces = [compiled(chunk, **{CACHE: cache}).logits for chunk in (ids[:, :9], ids[:, 9:])]
    assert torch.allclose(torch.cat(pieces, dim=1), expected, atol=1e-5)
