"""Re-fitting on the pruned prefix: the normal equations, what stays untouched, and that outputs come closer."""

import pytest
import torch
from support.tiny import tiny_llama

import hf_gqaprune as gp
from hf_gqaprune.compensation import least_squares
from hf_gqaprune.compensation.least_squares import NormalEquations, refit_on_pruned_prefix
from hf_gqaprune.linalg import symmetric
from hf_gqaprune.plan import LayerPlan, PruningPlan


@pytest.mark.parametrize("strip", [2, 1024])
def test_sums_give_the_ridge_solution_and_its_error(strip, monkeypatch):
    monkeypatch.setattr(symmetric, "_STRIP", strip)
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(40, 5, generator=generator), torch.randn(40, 3, generator=generator)
    prior = torch.randn(3, 5, generator=generator).double()
    sums = NormalEquations.zeros(3, 5, torch.device("cpu"))
    sums.add(x[:25], t[:25])
    sums.add(x[25:], t[25:])
    sums.complete()
    assert torch.allclose(sums.gram, x.T.double() @ x.double(), rtol=1e-5, atol=1e-5)
    weight = sums.solve(prior, 0.1)
    r = 0.1 * float(x.square().sum(0).mean())
    gradient = (weight @ x.T.double() - t.T.double()) @ x.double() + r * (weight - prior)
    assert gradient.abs().max() < 1e-4
    direct = (t.double() - x.double() @ weight.T).square().sum()
    assert sums.error(weight) == pytest.approx(float(direct), rel=1e-5)


def test_inputs_that_are_all_zero_keep_the_weights():
    sums = NormalEquations.zeros(2, 3, torch.device("cpu"))
    sums.add(torch.zeros(4, 3), torch.ones(4, 2))
    sums.complete()
    prior = torch.arange(6.0, dtype=torch.float64).view(2, 3)
    assert torch.equal(sums.solve(prior, 0.01), prior)


def test_a_sketch_keeps_sums_of_rows_and_norms():
    generator = torch.Generator().manual_seed(0)
    few, many = (torch.randn(count, 7, generator=generator) for count in (1024, 1025))
    assert torch.equal(least_squares._sketched(few), few.double())
    sketch = least_squares._sketched(many)
    assert sketch.shape == (512, 7)
    mix = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    assert torch.allclose(least_squares._sketched(many.double() @ mix), sketch @ mix)
    assert float(sketch.square().sum() / many.double().square().sum()) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize(("noise", "best"), [(0.0, 0), (0.015, 1), (0.04, 2), (3.0, 3)])
def test_many_outputs_choose_the_ridge_that_all_of_them_would(noise, best, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(3000, 12, generator=generator)
    true[17] *= 100  # one output in which most of the energy lies
    sums = []
    for _ in range(2):
        x = torch.randn(16, 12, generator=generator)
        sums.append(NormalEquations.zeros(3000, 12, torch.device("cpu")))
        sums[-1].add(x, x @ true.T + noise * torch.randn(16, 3000, generator=generator) * true.norm(dim=1))
        sums[-1].complete()
    prior = (true + 0.3 * torch.randn(3000, 12, generator=generator) * true.norm(dim=1)[:, None] / 3).double()
    errors = [sums[1].error(sums[0].solve(prior, ridge)) for ridge in least_squares.RIDGES]
    assert errors.index(min(errors)) == best
    for sketch in (least_squares._SKETCH, 3000):
        monkeypatch.setattr(least_squares, "_SKETCH", sketch)
        fit, held = (NormalEquations(s.gram, least_squares._sketched(s.cross)) for s in sums)
        assert least_squares.best_ridge(fit, held, least_squares._sketched(prior)) == least_squares.RIDGES[best]


@pytest.fixture(scope="module")
def measured():
    torch.manual_seed(0)
    model = tiny_llama(layers=3, ffn=24)
    ids = torch.randint(2, model.config.vocab_size, (32, 16), generator=torch.Generator().manual_seed(1))
    return model, gp.collect_statistics(model, gp.Calibration(ids))


def _plan(statistics, layers):
    """Half of the FFN of `layers` goes, nothing else."""
    source = statistics.source
    kept = []
    for index, shape in enumerate(source.layers):
        channels = range(shape.ffn // 2) if index in layers else range(shape.ffn)
        kept.append(LayerPlan.of_groups(shape, range(shape.kv_heads), channels))
    return PruningPlan(source, tuple(kept))


def test_nothing_before_the_first_difference_changes(measured):
    model, statistics = measured
    pruned = gp.prune(model, _plan(statistics, {1}), compensation="none")
    refit_on_pruned_prefix(model, pruned, statistics.calibration)
    before, after = model.model.layers, pruned.model.layers
    for name, weight in before[0].named_parameters():
        assert torch.equal(weight, after[0].get_parameter(name)), name
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj"):
        kept = after[1].get_submodule(name).weight
        assert torch.equal(before[1].get_submodule(name).weight[: len(kept)], kept), name
    assert not torch.equal(before[2].mlp.down_proj.weight, after[2].mlp.down_proj.weight)


def test_a_plan_that_keeps_everything_is_left_bit_equal(measured):
    model, statistics = measured
    pruned = gp.prune(model, PruningPlan.keep_all(model.config), statistics)
    ids = statistics.calibration.ids[:4]
    assert torch.equal(pruned(ids).logits, model(ids).logits)


def test_outputs_come_closer_to_the_dense_model(measured):
    model, statistics = measured
    plan = _plan(statistics, {0, 1, 2})
    ids = statistics.calibration.ids
    sliced = gp.prune(model, plan, compensation="none")
    refitted = gp.prune(model, plan, compensation="none")
    refit_on_pruned_prefix(model, refitted, statistics.calibration)
    target = model.model(ids).last_hidden_state
    distance = [(m.model(ids).last_hidden_state - target).square().mean() for m in (sliced, refitted)]
    assert distance[1] < 0.7 * distance[0]


def test_the_dense_model_stays_as_it_was(measured):
    model, statistics = measured
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    gp.prune(model, _plan(statistics, {0}), statistics)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
