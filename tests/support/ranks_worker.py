"""Run by `test_ranks.py` in two processes: what they measure together is what one process measures."""

from __future__ import annotations

import copy
import sys

import torch
import torch.distributed as dist
from tiny import tiny_llama, token_ids

from hf_gqaprune import Calibration, Statistics, collect_statistics, make_plan, prune
from hf_gqaprune.compensation.least_squares import refit_on_pruned_prefix
from hf_gqaprune.compensation.natural_gradient import Predictions, _divergence

CRITERIA = ("curvature", "taylor", "flap")


def close(ours: Statistics, theirs: Statistics) -> None:
    assert ours.blocks.keys() == theirs.blocks.keys()
    for key, block in ours.blocks.items():
        other = theirs.blocks[key]
        assert block.moments.tokens == other.moments.tokens
        for name in ("inputs", "input_mean", "gradients"):
            a, b = getattr(block.moments, name), getattr(other.moments, name)
            if a is not None:
                assert float((a - b).norm() / b.norm()) < 1e-6, (key, name)
        assert torch.equal(block.curve.order, other.curve.order)
        torch.testing.assert_close(block.curve.cost, other.curve.cost, rtol=1e-5, atol=0)


def main() -> None:
    model = tiny_llama(layers=3, kv_heads=4, ffn=24)
    # five windows held out and 36 fitted: the shares are not equal
    calibration = Calibration.from_ids(token_ids(41, 12))
    alone = {criterion: collect_statistics(model, calibration, criterion=criterion) for criterion in CRITERIA}
    plan = make_plan(alone["curvature"], backbone_ratio=0.4)
    searched = make_plan(alone["curvature"], model=model, backbone_ratio=0.4, allocation="search")
    plain = prune(model, plan, Statistics(plan.source, "curvature", alone["curvature"].blocks), compensation="least_squares")
    refitted = copy.deepcopy(plain)
    refit_on_pruned_prefix(model, refitted, calibration)
    before = _divergence(Predictions.of(model, calibration.held_out), refitted)

    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    for criterion in CRITERIA:
        close(collect_statistics(model, calibration, criterion=criterion), alone[criterion])
    together = collect_statistics(model, calibration)
    assert make_plan(together, model=model, backbone_ratio=0.4, allocation="search") == searched
    refit_on_pruned_prefix(model, plain, calibration)
    for (name, a), b in zip(plain.named_parameters(), refitted.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    pruned = prune(model, plan, together)
    for name, parameter in pruned.named_parameters():
        first = parameter.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, parameter), name
    after = _divergence(Predictions.of(model, calibration.held_out), pruned)
    # of random tokens nothing may be learnt, and then nothing is done
    assert after <= before * (1 + 1e-6) and "passes" in pruned.compensation_record
    # one window: a process without any still takes part
    few = Calibration.from_ids(token_ids(1, 12))
    assert collect_statistics(model, few).blocks[0, "mlp"].moments.tokens == 12
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
