"""The steps towards the dense model's predictions: their length, what they move, and what is said of them."""

import json
import logging
import math

import pytest
import torch
from support.tiny import tiny_llama
from torch.func import functional_call
from torch.nn import functional as F

import hf_gqaprune as gp
from hf_gqaprune.compensation import natural_gradient
from hf_gqaprune.compensation.natural_gradient import Predictions, _Curvature, _Descent, natural_gradient_steps
from hf_gqaprune.models import eval_without_grad
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


@pytest.fixture
def descent(models, monkeypatch):
    """Where the steps begin, all fitted windows being one batch."""
    monkeypatch.setattr(natural_gradient, "_STEPS", 1)
    model, pruned, calibration = models
    fitted, held_out = (Predictions.of(model, windows) for windows in (calibration.fitted, calibration.held_out))
    assert len(fitted) == len(held_out) == 1
    with eval_without_grad(pruned):
        yield _Descent(pruned, fitted, held_out, 0)


def _divergence(model, pruned, ids):
    with torch.no_grad():
        wanted, given = (m(ids).logits.log_softmax(-1) for m in (model, pruned))
    return float(F.kl_div(given, wanted, log_target=True, reduction="sum")) / ids.numel()


def _weights(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def _same(model, before):
    return all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_predictions_are_those_of_the_model_bit_for_bit(models):
    model, _, calibration = models
    predictions = Predictions.of(model, calibration.held_out)
    for _ in range(2):
        ids, log_probs = (torch.cat(parts) for parts in zip(*predictions, strict=True))
        assert torch.equal(ids, calibration.held_out)
        assert torch.equal(log_probs, model(ids).logits.log_softmax(-1))
    assert predictions.sizes == [calibration.held_out.numel()]


def _gradients(model, pruned, weights, ids):
    """Of the divergence in nats per token, by the definition."""
    for weight in weights:
        weight.requires_grad_(True)
    given, wanted = pruned(ids).logits.log_softmax(-1), model(ids).logits.log_softmax(-1).detach()
    loss = F.kl_div(given, wanted, log_target=True, reduction="sum") / ids.numel()
    gradients = torch.autograd.grad(loss, weights)
    for weight in weights:
        weight.requires_grad_(False)
    return gradients


def test_every_linear_of_the_layers_moves_down_the_gradient_of_the_divergence(models, descent):
    model, pruned, calibration = models
    linears = [m.weight for m in pruned.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 2 * 7 and all(a is b for a, b in zip(descent.weights, linears, strict=True))
    found = descent._gradients(descent.fitted, [0])
    for gradient, expected in zip(found, _gradients(model, pruned, linears, calibration.fitted), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-7)
    assert all(weight.grad is None for weight in pruned.parameters())


def test_the_direction_solves_both_sides():
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(3, 5, generator=generator) for _ in range(8)]
    curvature = _Curvature(torch.empty(3, 5))
    for gradient in gradients:
        curvature.add(gradient)
    curvature.invert(40)

    def ridged(matrix):
        return matrix + 0.01 * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)

    stacked = torch.stack(gradients).double()
    outputs = torch.einsum("kij,klj->il", stacked, stacked) / 40
    inputs = torch.einsum("kji,kjl->il", stacked, stacked) / (40 * outputs.trace())
    slope = torch.randn(3, 5, generator=generator)
    back = ridged(outputs) @ curvature.direction(slope).double() @ ridged(inputs)
    torch.testing.assert_close(back, slope.double(), rtol=1e-4, atol=1e-4)


def test_factors_of_one_outer_product_are_its_own():
    # g = a b^T: F = (a a^T) (x) (b b^T) is a Kronecker product, and what is found is that one
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0, 4.0])
    curvature = _Curvature(torch.empty(2, 3))
    curvature.add(torch.outer(a, b))
    assert torch.equal(curvature.outputs, 25 * torch.outer(a, a))
    assert torch.equal(curvature.inputs, 5 * torch.outer(b, b))
    # tr G = 25 * 5 and A = 5 b b^T / 125: the trace of the product is |a|^2 |b|^2
    assert float(curvature.outputs.trace() * curvature.inputs.trace() / curvature.outputs.trace()) == 125


def test_the_curvature_is_the_quadratic_form_of_the_fisher(descent):
    generator = torch.Generator().manual_seed(3)
    directions = [torch.randn(weight.shape, generator=generator) for weight in descent.weights]
    before, pruned = _weights(descent.pruned), descent.pruned
    pruned.set_attn_implementation("eager")  # the one that can be differentiated forward
    found = descent._quadratic_form(directions)
    assert _same(pruned, before)
    ids = descent.held_out.batches[0]
    names = {id(weight): name for name, weight in pruned.named_parameters()}
    way = {names[id(weight)]: direction for weight, direction in zip(descent.weights, directions, strict=True)}
    point = {name: weight for name, weight in pruned.named_parameters() if name in way}

    def logits(weights):
        return functional_call(pruned, weights, (ids,), {"use_cache": False}).logits

    at, change = torch.func.jvp(logits, (point,), ({name: way[name] for name in point},))
    probability = at.softmax(-1)
    # the Fisher of a categorical distribution: the variance of what its logits change by
    mean = (probability * change).sum(-1, keepdim=True)
    expected = float((probability * (change - mean).square()).sum()) / ids.numel()
    assert found == pytest.approx(expected, rel=0.1)


def test_the_best_length_is_the_minimum_of_the_quadratic_model(models, descent):
    model, pruned, calibration = models
    held = _gradients(model, pruned, descent.weights, calibration.held_out)
    slope = sum(float(g.square().sum()) for g in held)
    expected = slope / descent._quadratic_form(list(held))
    assert descent._best_length(list(held)) == pytest.approx(expected, rel=0.05)
    # uphill no length helps
    assert descent._best_length([-g for g in held]) == 0.0


def test_held_out_divergence_falls_and_all_linears_of_the_layers_move(models):
    model, pruned, calibration = models
    before, dense = _weights(pruned), _weights(model)
    start = _divergence(model, pruned, calibration.held_out)
    passes = natural_gradient_steps(model, pruned, calibration)
    end = _divergence(model, pruned, calibration.held_out)
    assert end < 0.95 * start
    assert passes[0].before == pytest.approx(start, rel=1e-4)
    assert min(step.after for step in passes if step.kept) == pytest.approx(end, rel=1e-4)
    for name, weight in pruned.named_parameters():
        assert torch.equal(weight, before[name]) is not name.endswith("_proj.weight"), name
        assert weight.requires_grad and weight.grad is None
    assert _same(model, dense)


def test_the_same_steps_twice_are_the_same_bits(models):
    model, pruned, calibration = models
    again = gp.prune(model, _half_of_the_ffn(model), compensation="none")
    assert natural_gradient_steps(model, pruned, calibration) == natural_gradient_steps(model, again, calibration)
    assert _same(pruned, _weights(again))


def test_lengths_fall_to_zero_over_all_passes(descent, monkeypatch):
    lengths = []
    monkeypatch.setattr(descent, "_step", lambda index, length: lengths.append(length))
    bar = type("Bar", (), {"update": staticmethod(lambda: None)})
    for number in range(natural_gradient._PASSES):
        descent._pass(number, 2.0, bar)
    assert lengths == pytest.approx([2 * (1 - k / natural_gradient._PASSES) for k in range(natural_gradient._PASSES)])


def test_a_pass_that_does_not_help_is_undone_and_said(models, monkeypatch, caplog):
    model, pruned, calibration = models
    before = _weights(pruned)
    monkeypatch.setattr(_Descent, "_best_length", lambda self, directions: 2e6)
    with caplog.at_level(logging.INFO, "hf_gqaprune.compensation.natural_gradient"):
        passes = natural_gradient_steps(model, pruned, calibration)
    assert [step.length for step in passes] == [1e6, 2.5e5, 62500.0, 15625.0]
    assert not any(step.kept for step in passes)
    assert len({step.before for step in passes}) == 1
    assert _same(pruned, before)
    assert ", undone" in caplog.text
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "no step towards the dense model's predictions helped: the model stays as it was refitted"
    ]


def test_what_was_done_is_part_of_the_pruned_model(models):
    model, _, calibration = models
    statistics = gp.collect_statistics(model, calibration)
    plan = gp.make_plan(statistics, backbone_ratio=0.3)
    done = gp.prune(model, plan, statistics).compensation_record["passes"]
    assert json.loads(json.dumps(done)) == done
    assert done and set(done[0]) == {"length", "before", "after", "kept"}
    assert all(math.isfinite(step["length"]) and step["length"] > 0 for step in done)
    assert "passes" not in gp.prune(model, plan, statistics, compensation="least_squares").compensation_record


def test_without_held_out_windows_nothing_changes_and_that_is_said(models, caplog):
    model, pruned, calibration = models
    before = _weights(pruned)
    assert natural_gradient_steps(model, pruned, gp.Calibration(calibration.ids[:7])) == []
    assert _same(pruned, before)
    assert "7 windows leave none to measure it on, give 8 or more" in caplog.text


def test_a_model_that_predicts_the_same_keeps_its_bits(models):
    model, _, calibration = models
    same = gp.prune(model, PruningPlan.keep_all(model.config), compensation="none")
    before = _weights(same)
    assert natural_gradient_steps(model, same, calibration) == []
    assert _same(same, before)


def test_half_precision_keeps_its_dtype(models):
    model, _, calibration = models
    model = model.to(torch.bfloat16)
    pruned = gp.prune(model, _half_of_the_ffn(model), compensation="none")
    start = _divergence(model.float(), pruned.float(), calibration.held_out)
    model, pruned = model.to(torch.bfloat16), pruned.to(torch.bfloat16)
    natural_gradient_steps(model, pruned, calibration)
    assert {weight.dtype for weight in pruned.parameters()} == {torch.bfloat16}
    assert _divergence(model.float(), pruned.float(), calibration.held_out) < start
