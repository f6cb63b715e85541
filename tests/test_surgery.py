"""A pruned model computes what the dense model computes with the removed units silenced."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tiny import VOCABULARY, tiny_config, tiny_llama, token_ids
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from hf_gqaprune import Calibration, PrunedLlamaForCausalLM, PruningPlan, collect_statistics, make_plan, prune
from hf_gqaprune.compensation.columns import refit_columns
from hf_gqaprune.errors import UsageError
from hf_gqaprune.models.shapes import ModelShape
from hf_gqaprune.plan import LayerPlan
from hf_gqaprune.statistics.moments import RIDGE, Moments
from hf_gqaprune.statistics.store import Statistics


@st.composite
def configs(draw: st.DrawFn) -> LlamaConfig:
    return tiny_config(
        kv_heads=draw(st.integers(1, 3)),
        n_rep=draw(st.sampled_from([1, 2, 3, 4, 7, 8])),
        head_dim=draw(st.sampled_from([8, 16, 24, 64, 128])),
        ffn=draw(st.integers(2, 9)),
        layers=draw(st.integers(1, 3)),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
    )


def some(draw: st.DrawFn, count: int, least: int) -> list[int]:
    return sorted(draw(st.sets(st.integers(0, count - 1), min_size=min(least, count)))) if count else []


@st.composite
def plans(draw: st.DrawFn, source: ModelShape) -> PruningPlan:
    """Any valid plan: whole groups, fewer query heads in every group, channels, absent blocks."""
    layers = []
    rescued = next(index for index, shape in enumerate(source.layers) if shape.kv_heads)
    for index, shape in enumerate(source.layers):
        groups = some(draw, shape.kv_heads, int(index == rescued))
        per_group = draw(st.integers(1, shape.n_rep)) if groups else 0
        heads: list[int] = []
        for group in groups:
            picked = draw(st.permutations(range(shape.n_rep)))[:per_group]
            heads += sorted(group * shape.n_rep + head for head in picked)
        layers.append(LayerPlan(tuple(groups), tuple(heads), tuple(some(draw, shape.ffn, 0))))
    return PruningPlan(
        source, tuple(layers), attention_bias=source.attention_bias, mlp_bias=source.mlp_bias
    )


def masked(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    """A copy of `model` in which the units that `plan` removes give zero; a block without units gives zero at all."""
    model = copy.deepcopy(model)
    for layer, kept, shape in zip(model.model.layers, plan.layers, plan.source.layers, strict=True):
        attention = ("self_attn", "o_proj", kept.query_heads, shape.head_dim)
        blocks = (attention, ("mlp", "down_proj", kept.ffn_channels, 1))
        for block, name, units, width in blocks:
            projection: nn.Linear | None = getattr(getattr(layer, block), name, None)
            if projection is None:
                continue
            keep = torch.zeros(projection.in_features // width, dtype=torch.bool)
            keep[list(units)] = True
            with torch.no_grad():
                projection.weight[:, ~keep.repeat_interleave(width)] = 0
                if not units and projection.bias is not None:
                    projection.bias.zero_()
    return model


def difference(first: PreTrainedModel, second: PreTrainedModel, *, padded: bool) -> float:
    """Largest difference of the logits of tokens that are no padding, relative to the largest logit."""
    ids = token_ids(2, 9)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
        mask[1, 7:] = 0
    with torch.no_grad():
        a, b = (model(ids, attention_mask=mask if padded else None).logits[mask.bool()] for model in (first, second))
    return float((a - b).abs().max() / b.abs().max())


def assert_consistent(model: PreTrainedModel) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == tuple(module.weight.shape), name
            assert module.bias is None or module.bias.shape == module.weight.shape[:1], name
    for layer in model.model.layers:
        if layer.self_attn is not None:
            attention = layer.self_attn
            assert attention.k_proj.out_features * attention.num_key_value_groups == attention.q_proj.out_features


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_pruned_equals_masked_dense_and_pruning_twice_equals_pruning_once(data: st.DataObject) -> None:
    config = data.draw(configs())
    dense = tiny_llama(config, seed=data.draw(st.integers(0, 99)))
    first = data.draw(plans(ModelShape.from_config(config)))
    once = prune(dense, first, compensation="none")
    second = data.draw(plans(first.target))
    twice = prune(once, second, compensation="none")
    whole = first.compose(second)
    for plan, pruned in ((first, once), (whole, twice)):
        assert_consistent(pruned)
        reference = masked(dense, plan)
        for implementation in ("eager", "sdpa"):
            pruned.set_attn_implementation(implementation)
            reference.set_attn_implementation(implementation)
            for padded in (False, True):
                assert difference(pruned, reference, padded=padded) <= 1e-5, (implementation, padded)
        assert pruned.num_parameters() == plan.after.parameters
    assert twice.prune_plan == whole.to_dict()
    direct = prune(dense, whole, compensation="none").state_dict()
    assert direct.keys() == twice.state_dict().keys()
    assert all(torch.equal(tensor, twice.state_dict()[name]) for name, tensor in direct.items())


@pytest.mark.parametrize("options", [{}, {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_keep_all_equals_dense_bit_for_bit(options: dict[str, bool], implementation: str) -> None:
    dense = tiny_llama(**options)
    dense.set_attn_implementation(implementation)
    kept = prune(dense, PruningPlan.keep_all(dense.config), compensation="none")
    assert type(kept) is PrunedLlamaForCausalLM
    assert not kept.training
    ids = token_ids()
    with torch.no_grad():
        assert torch.equal(kept(ids).logits, dense(ids).logits)
        assert torch.equal(kept.generate(ids, max_new_tokens=5), dense.generate(ids, max_new_tokens=5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_reload_equals_saved_bit_for_bit(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    dense = tiny_llama(layers=3, tie_word_embeddings=tied).to(dtype)
    calibration = Calibration.from_ids(token_ids(8, 16))
    statistics = collect_statistics(dense, calibration, criterion="taylor")
    plan = make_plan(statistics, backbone_ratio=0.4, min_kv_heads=0, min_ffn=0)
    pruned = prune(dense, plan, statistics)
    assert {parameter.dtype for parameter in pruned.parameters()} == {dtype}
    pruned.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is PrunedLlamaForCausalLM
    assert loaded.prune_plan == pruned.prune_plan == plan.to_dict()
    assert PruningPlan.load(tmp_path / "prune_plan.json") == plan
    with torch.no_grad():
        logits = pruned(token_ids()).logits
        assert torch.equal(loaded(token_ids()).logits, logits)
    assert logits.dtype == dtype and bool(torch.isfinite(logits).all())


def half_plan(model: PreTrainedModel) -> PruningPlan:
    return make_plan(model=model, criterion="magnitude", backbone_ratio=0.5)


def test_the_input_model_is_left_alone() -> None:
    dense = tiny_llama().train()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    config = dense.config.to_dict()
    pruned = prune(dense, half_plan(dense), compensation="none")
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.fill_(9.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    assert dense.config.to_dict() == config
    assert dense.training and not pruned.training
    assert all(parameter.requires_grad for parameter in pruned.parameters())


def test_inplace_gives_the_same_weights_and_frees_the_layers() -> None:
    dense = tiny_llama(attention_bias=True)
    plan = half_plan(dense)
    expected = prune(dense, plan, compensation="none").state_dict()
    pruned = prune(dense, plan, compensation="none", inplace=True)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in pruned.state_dict().items())
    assert {parameter.device.type for parameter in dense.model.layers.parameters()} == {"meta"}


@pytest.mark.parametrize("compensation", ["least_squares", "natural_gradient"])
def test_inplace_is_fitted_to_the_dense_model_as_it_was(compensation: str) -> None:
    dense = tiny_llama(layers=3)
    statistics = collect_statistics(dense, Calibration.from_ids(token_ids(16, 24)))
    # blocks behind the first difference stay whole
    plan = make_plan(statistics, backbone_ratio=0.2, keep_layers=(1, 2))
    expected = prune(dense, plan, statistics, compensation=compensation).state_dict()
    pruned = prune(dense, plan, statistics, compensation=compensation, inplace=True).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in pruned.items())


@pytest.mark.parametrize("compensation", ["least_squares", "natural_gradient"])
def test_a_dense_model_in_train_mode_drops_nothing(compensation: str) -> None:
    dense = tiny_llama(attention_dropout=0.5)
    statistics = collect_statistics(dense, Calibration.from_ids(token_ids(16, 24)))
    plan = make_plan(statistics, backbone_ratio=0.2)
    found = [prune(dense.train(mode), plan, statistics, compensation=compensation).state_dict() for mode in (True, False)]
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def moments_of(x: torch.Tensor) -> Moments:
    return Moments(len(x), (x.T @ x / len(x)).float(), x.mean(0).float())


def test_refit_of_a_two_column_weight_by_hand() -> None:
    # H + ridge I = [[1.01, 0.5], [0.5, 1.01]]: the kept column takes over 0.5 / 1.01 of the one that goes
    moments = Moments(1, torch.tensor([[1.0, 0.5], [0.5, 1.0]]), torch.zeros(2))
    weight = torch.tensor([[1.0, 2.0], [0.0, -3.0]])
    refitted = refit_columns(weight, moments, torch.tensor([0]))
    assert RIDGE == 0.01
    expected = torch.tensor([[1 + 2 * 0.5 / 1.01], [-3 * 0.5 / 1.01]])
    assert torch.allclose(refitted, expected, rtol=1e-6, atol=0)


def test_refit_of_equal_columns_keeps_the_output() -> None:
    x = torch.randn(50, 1, generator=torch.Generator().manual_seed(0)).repeat(1, 2)
    weight = torch.tensor([[1.0, 2.0]])
    refitted = refit_columns(weight, moments_of(x), torch.tensor([1]))
    assert torch.allclose(refitted, torch.tensor([[3.0]]), atol=0.02)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 8), st.integers(1, 5))
def test_refit_is_optimal(seed: int, columns: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    keep = torch.randperm(columns, generator=generator)[: columns - 1].sort().values
    moments = moments_of(x)
    h = moments.ridged()

    def objective(kept: torch.Tensor) -> float:
        error = weight.clone()
        error[:, keep] -= kept
        return float((error @ h @ error.T).trace())

    best = refit_columns(weight, moments, keep)
    least = objective(best)
    assert least <= objective(weight[:, keep])
    for scale in (1e-3, 1e-1):
        step = torch.randn(best.shape, generator=generator, dtype=torch.float64) * scale
        assert objective(best + step) > least
        assert objective(best - step) > least


def calibrated(model: PreTrainedModel, criterion: str = "curvature") -> Statistics:
    return collect_statistics(model, Calibration.from_ids(token_ids(8, 24, seed=3)), criterion=criterion)


def test_moments_alone_refit_output_projections_and_bring_the_outputs_closer() -> None:
    dense = tiny_llama(layers=1, kv_heads=4, ffn=24)
    statistics = dataclasses.replace(calibrated(dense), calibration=None)
    plan = make_plan(statistics, backbone_ratio=0.4)
    sliced, refitted = prune(dense, plan, compensation="none"), prune(dense, plan, statistics, compensation="least_squares")
    differing = {
        name for name, tensor in refitted.state_dict().items() if not torch.equal(tensor, sliced.state_dict()[name])
    }
    assert differing == {"model.layers.0.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.weight"}
    ids = token_ids(6, 24, seed=3)
    hidden = []
    for model in (dense, sliced, refitted):
        with torch.no_grad():
            x = model.model(ids, output_hidden_states=True).hidden_states[0]
            layer = model.model.layers[0]
            position = model.model.rotary_emb(x, torch.arange(24)[None])
            hidden.append(layer.self_attn(layer.input_layernorm(x), position, attention_mask=None)[0])
    dense_output, sliced_output, refitted_output = hidden
    assert (refitted_output - dense_output).norm() < (sliced_output - dense_output).norm()


def test_blocks_that_stay_whole_are_not_refitted() -> None:
    dense = tiny_llama()
    statistics = calibrated(dense)
    plan = PruningPlan.keep_all(dense.config)
    kept = prune(dense, plan, statistics).state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in dense.state_dict().items())


def test_bad_requests_are_refused() -> None:
    dense = tiny_llama()
    plan = half_plan(dense)
    other = tiny_llama(ffn=16)
    with pytest.raises(UsageError, match="layer 0: the plan is for 4 query / 2 KV heads of 8 and FFN 12, the"):
        prune(other, plan, compensation="none")
    with pytest.raises(UsageError, match="unknown compensation 'least_square' \\(did you mean 'least_squares'\\?\\)"):
        prune(dense, plan, compensation="least_square")
    with pytest.raises(UsageError, match="needs statistics with moments"):
        prune(dense, plan)
    with pytest.raises(UsageError, match="made without calibration"):
        prune(dense, plan, collect_statistics(dense, criterion="magnitude", moments=False))
    with pytest.raises(UsageError, match="of other sizes"):
        prune(dense, plan, calibrated(other, "wanda"))
    with pytest.raises(UsageError, match="vocab_size=48, the model has 49"):
        prune(tiny_llama(vocab_size=VOCABULARY + 1), plan, compensation="none")


def test_steps_need_a_held_out_window() -> None:
    dense = tiny_llama()
    statistics = collect_statistics(dense, Calibration.from_ids(token_ids(7, 24)))
    plan = make_plan(statistics, backbone_ratio=0.3)
    with pytest.raises(UsageError, match=r"7 calibration windows hold none out: give at least 8 \(--samples\)"):
        prune(dense, plan, statistics)


def test_least_squares_without_windows_says_that_it_is_the_first_half(caplog: pytest.LogCaptureFixture) -> None:
    dense = tiny_llama()
    statistics = dataclasses.replace(calibrated(dense), calibration=None)
    prune(dense, make_plan(statistics, backbone_ratio=0.3), statistics, compensation="least_squares")
    assert "without calibration windows refits o_proj and down_proj" in caplog.text
