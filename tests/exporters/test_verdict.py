"""Where a model can be served follows from its sizes alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.served import ARCHITECTURES, served_checkpoint, served_model

import hf_gqaprune as gp
from hf_gqaprune.exporters.verdict import NO, PLUGIN, YES, layers_off_blocks, tensor_parallel_sizes, verdicts
from hf_gqaprune.models import LayerShape, ModelShape


def shape(*layers: tuple[int, int, int], hidden: int = 4096, head_dim: int = 128) -> ModelShape:
    sizes = tuple(LayerShape(*layer, head_dim) for layer in layers)
    return ModelShape(hidden, 128256, False, False, False, "bfloat16", sizes)


def answers(model: ModelShape, tensor_parallel: int = 1) -> dict[str, str]:
    return {verdict.engine: verdict.answer for verdict in verdicts(model, tensor_parallel)}


LLAMA_3_8B = shape(*[(32, 8, 14336)] * 32)


def test_a_dense_model_runs_everywhere():
    for size in (1, 2, 4, 8):
        assert set(answers(LLAMA_3_8B, size).values()) == {YES}
    assert all(not verdict.constraint for verdict in verdicts(LLAMA_3_8B))


def test_unequal_layers_need_an_engine_that_takes_them():
    model = shape((32, 8, 14336), (24, 6, 11520))
    assert answers(model) == {
        "transformers": YES, "vLLM": YES, "llama.cpp": YES, "ollama": YES, "engines for plain Llama": NO,
    }  # fmt: skip
    plain = next(verdict for verdict in verdicts(model) if verdict.answer == NO)
    assert "--to llama --pad adds" in plain.constraint


def test_equal_layers_whose_heads_do_not_divide_the_hidden_size_are_no_plain_llama():
    assert answers(shape(*[(24, 6, 11520)] * 2))["engines for plain Llama"] == NO
    assert answers(shape(*[(24, 6, 11520)] * 2, hidden=3072))["engines for plain Llama"] == YES


def test_removed_attention_needs_a_plugin_in_vllm_only():
    found = {verdict.engine: verdict for verdict in verdicts(shape((32, 8, 14336), (0, 0, 14336)))}
    assert found["vLLM"].answer == PLUGIN and found["vLLM"].constraint == "keep one KV group in every layer"
    assert found["llama.cpp"].answer == YES and "1 removed blocks as blocks of zeros" in found["llama.cpp"].reason
    assert answers(shape((32, 8, 14336), (32, 8, 0)))["vLLM"] == YES


@pytest.mark.parametrize(
    "layer, shared, own",
    [((32, 8, 14336), (1, 2, 4, 8), (1, 2, 4, 8)), ((24, 6, 11520), (1, 2, 3, 6), (1, 2, 3, 6)), ((8, 2, 512), (1, 2, 4, 8), (1, 2)),
     ((20, 5, 512), (1,), (1,)), ((32, 8, 11001), (1,), (1,)), ((0, 0, 512), (1, 2, 4, 8), (1, 2, 4, 8))],
)  # fmt: skip
def test_layers_are_split_over_gpus_only_evenly(layer, shared, own):
    model = shape(layer)
    assert tensor_parallel_sizes(model) == shared
    assert tensor_parallel_sizes(model, shared_kv=False) == own


def test_a_number_of_gpus_that_does_not_divide_is_a_no_with_the_numbers_that_do():
    found = {verdict.engine: verdict for verdict in verdicts(shape((32, 8, 14336), (24, 6, 11520)), 4)}
    assert found["vLLM"].answer == NO
    assert str(found["vLLM"]) == (
        "vLLM: no, 4 GPUs do not divide the query heads, KV heads or FFN of layer 1; "
        "1, 2 would, or keep multiples of 4 in every layer"
    )
    # one process computes it whole
    assert found["llama.cpp"].answer == YES
    with pytest.raises(gp.UsageError, match="tensor_parallel=0 must be at least 1"):
        verdicts(LLAMA_3_8B, 0)


def test_quantization_blocks_are_counted():
    model = shape((32, 8, 14336), (32, 8, 11520), (32, 8, 11552), (32, 8, 11553), (30, 10, 11520), head_dim=64)
    assert layers_off_blocks(model, 32) == [3]
    assert layers_off_blocks(model, 256) == [2, 3, 4]
    constraint = next(verdict.constraint for verdict in verdicts(model) if verdict.engine == "llama.cpp")
    assert constraint == "Q8_0 falls back to F16 in layer 3: keep FFN and query widths at multiples of 32"
    narrow = replace(model, layers=model.layers[:3])
    constraint = next(verdict.constraint for verdict in verdicts(narrow) if verdict.engine == "llama.cpp")
    assert constraint == "K-quants fall back to larger types in layer 2: keep FFN and query widths at multiples of 256"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_verdict_on_plain_llama_is_what_the_export_does(name, tmp_path):
    plain = verdicts(ModelShape.from_config(served_model(name).config))[-1]
    served_checkpoint(name, tmp_path / "model")
    if plain.answer == YES:
        gp.export(tmp_path / "model", tmp_path / "plain", to="llama")
    else:
        with pytest.raises(gp.UsageError) as error:
            gp.export(tmp_path / "model", tmp_path / "plain", to="llama")
        added = plain.constraint.split(" adds ")[1].split(" zeros")[0]
        assert f"with {added} zeros" in str(error.value)
