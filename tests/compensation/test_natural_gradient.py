"""The natural-gradient steps: direction, length by held-out divergence, and what they leave alone."""

import pytest
import torch
from support.tiny import tiny_llama
from torch.nn import functional as F

import hf_gqaprune as gp
from hf_gqaprune.compensation.natural_gradient import (
    Predictions,
    _line_search,
    _measure,
    natural_gradient_steps,
    output_hooks,
)
from hf_gqaprune.plan import LayerPlan, PruningPlan


def _half_of_the_ffn(model):
    source = PruningPlan.keep_all(model.config).source
    kept = [LayerPlan.of_groups(shape, range(shape.kv_heads), range(shape.ffn // 2)) for shape in source.layers]
    return PruningPlan(source, tuple(kept))


@pytest.fixture
def models():
    """A dense model, one with half of its FFN, and calibration of 32 windows."""
    model = tiny_llama(layers=2, ffn=24)
    ids = torch.randint(2, model.config.vocab_size, (32, 16), generator=torch.Generator().manual_seed(1))
    return model, gp.prune(model, _half_of_the_ffn(model), compensation="none"), gp.Calibration(ids)


def _divergence(model, pruned, ids):
    with torch.no_grad():
        wanted, given = (m(ids).logits.log_softmax(-1) for m in (model, pruned))
    return float(F.kl_div(given, wanted, log_target=True, reduction="sum")) / ids.numel()


def _weights(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def test_the_slope_is_the_gradient_of_the_divergence(models):
    model, pruned, calibration = models
    hooks = output_hooks(pruned)
    _measure(Predictions.of(model, calibration.fitted), pruned, 0, hooks)
    ids = calibration.fitted
    with torch.no_grad():
        wanted = model(ids).logits.log_softmax(-1)
    F.kl_div(pruned(ids).logits.log_softmax(-1), wanted, log_target=True, reduction="sum").backward()
    layers = pruned.model.layers
    linears = [linear for layer in layers for linear in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    assert [hook.linear for hook in hooks] == linears
    for hook in hooks:
        torch.testing.assert_close(hook.slope, hook.linear.weight.grad, rtol=1e-3, atol=1e-4)
        assert hook.tokens == ids.numel()


def test_predictions_are_those_of_the_model_bit_for_bit(models):
    model, _, calibration = models
    predictions = Predictions.of(model, calibration.held_out)
    for _ in range(2):
        ids, log_probs = (torch.cat(parts) for parts in zip(*predictions, strict=True))
        assert torch.equal(ids, calibration.held_out)
        assert torch.equal(log_probs, model(ids).logits.log_softmax(-1))


def test_the_direction_solves_both_sides(models):
    model, pruned, calibration = models
    hooks = output_hooks(pruned)
    _measure(Predictions.of(model, calibration.fitted), pruned, 0, hooks)
    for hook in hooks:
        def ridged(total, tokens=hook.tokens):
            mean = total.double() / tokens
            return mean + 0.01 * mean.diagonal().mean() * torch.eye(len(mean), dtype=torch.float64)

        # the sums go where their factors are kept
        outputs, inputs = ridged(hook.outputs), ridged(hook.inputs)
        for scale in (1.0, 2.0):
            hook.slope *= scale
            back = outputs @ hook.direction() @ inputs
            torch.testing.assert_close(back, hook.slope.double() / hook.tokens)


def test_held_out_divergence_falls_and_only_output_projections_move(models):
    model, pruned, calibration = models
    before, dense = _weights(pruned), _weights(model)
    start = _divergence(model, pruned, calibration.held_out)
    assert natural_gradient_steps(model, pruned, calibration)
    assert _divergence(model, pruned, calibration.held_out) < start
    for name, weight in pruned.named_parameters():
        moved = name.endswith(("o_proj.weight", "down_proj.weight"))
        assert torch.equal(weight, before[name]) is not moved, name
        assert weight.requires_grad and weight.grad is None
    assert all(torch.equal(weight, dense[name]) for name, weight in model.named_parameters())
    assert not any(module._forward_hooks for module in pruned.modules())


def test_the_same_step_twice_is_the_same_bits(models):
    model, pruned, calibration = models
    again = gp.prune(model, _half_of_the_ffn(model), compensation="none")
    assert natural_gradient_steps(model, pruned, calibration) == natural_gradient_steps(model, again, calibration)
    assert all(torch.equal(a, b) for a, b in zip(pruned.parameters(), again.parameters(), strict=True))


def test_without_held_out_windows_nothing_changes(models):
    model, pruned, calibration = models
    before = _weights(pruned)
    assert natural_gradient_steps(model, pruned, gp.Calibration(calibration.ids[:7])) == []
    assert all(torch.equal(weight, before[name]) for name, weight in pruned.named_parameters())


def test_a_model_that_predicts_the_same_keeps_its_bits(models):
    model, _, calibration = models
    same = gp.prune(model, PruningPlan.keep_all(model.config), compensation="none")
    before = _weights(same)
    assert natural_gradient_steps(model, same, calibration) == []
    assert all(torch.equal(weight, before[name]) for name, weight in same.named_parameters())


def test_half_precision_keeps_its_dtype(models):
    model, _, calibration = models
    model = model.to(torch.bfloat16)
    pruned = gp.prune(model, _half_of_the_ffn(model), compensation="none")
    start = _divergence(model.float(), pruned.float(), calibration.held_out)
    model, pruned = model.to(torch.bfloat16), pruned.to(torch.bfloat16)
    natural_gradient_steps(model, pruned, calibration)
    assert {weight.dtype for weight in pruned.parameters()} == {torch.bfloat16}
    assert _divergence(model.float(), pruned.float(), calibration.held_out) <= start * 1.05


def test_a_second_pass_measures_the_slope_anew_and_keeps_the_curvature(models):
    model, pruned, calibration = models
    hooks = output_hooks(pruned)
    _measure(Predictions.of(model, calibration.fitted), pruned, 0, hooks)
    first = [(hook.direction(), hook.slope.clone(), hook.inputs.clone(), hook.outputs.clone()) for hook in hooks]
    _measure(Predictions.of(model, calibration.fitted), pruned, 0, hooks)
    for hook, (direction, slope, inputs, outputs) in zip(hooks, first, strict=True):
        assert torch.equal(hook.slope, slope) and torch.equal(hook.direction(), direction)
        assert torch.equal(hook.inputs, inputs) and torch.equal(hook.outputs, outputs)


@pytest.mark.parametrize(
    ("best", "expected"), [(0.02, 0.02), (0.08, 0.08), (0.005, 0.005), (0.0001, 0.0), (1e9, 0.01 * 2**7)]
)
def test_the_line_search_doubles_or_halves_from_where_it_starts(best, expected):
    found, length = _line_search(lambda s: abs(s - best), best, 0.01)
    assert length == expected and found == abs(length - best) if length else found == best
