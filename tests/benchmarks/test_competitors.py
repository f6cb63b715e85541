"""What each competitor in the quality table decides, checked against its paper's own statement."""

from __future__ import annotations

import copy

import pytest
import torch
from competitors import METHODS, Dense, flap, llm_pruner, osscar, short_gpt, taylor_uniform
from support.tiny import tiny_llama, token_ids

from hf_gqaprune import Calibration, make_plan, prune
from hf_gqaprune.models.blocks import OUTPUT_PROJECTION


def dense(**shape: int) -> Dense:
    """A random Llama and 32 windows of 12 tokens, four of them held out."""
    return Dense(tiny_llama(**{"layers": 3, "kv_heads": 4, "ffn": 16} | shape), Calibration.from_ids(token_ids(32, 12)))


def backbone(model: torch.nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and not name.endswith("bias"))


def outputs(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs of every output projection, `(tokens, in_features)`, and its output by `<name>.out`."""
    found: dict[str, torch.Tensor] = {}
    handles = []
    for index, layer in enumerate(model.model.layers):
        for name in OUTPUT_PROJECTION.values():

            def keep(_module, args, output, key=f"{index}.{name}"):
                found[key], found[key + ".out"] = args[0].flatten(0, 1), output.flatten(0, 1)

            handles.append(layer.get_submodule(name).register_forward_hook(keep))
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("method", [name for name in METHODS if name != "ShortGPT"])
def test_a_competitor_keeps_the_budget_and_leaves_the_dense_model_alone(method: str) -> None:
    source = dense()
    before = copy.deepcopy(source.model.state_dict())
    pruned = METHODS[method](source, 0.4)
    whole = backbone(source.model)
    channel = 3 * source.model.config.hidden_size
    assert abs(backbone(pruned) - 0.6 * whole) <= channel * len(source.model.model.layers)
    assert all(torch.equal(value, before[name]) for name, value in source.model.state_dict().items())
    assert torch.isfinite(pruned(token_ids(2, 8)).logits).all()


def test_flap_gives_back_the_mean_of_what_went() -> None:
    source = dense(layers=1)
    pruned = flap(source, 0.4)
    ids = source.calibration.ids
    ours, theirs = outputs(source.model, ids), outputs(pruned, ids)
    # the attention sees the same inputs in both models, so its mean output is the dense one's
    name = "0." + OUTPUT_PROJECTION["attention"]
    assert theirs[name].shape[1] < ours[name].shape[1]
    torch.testing.assert_close(theirs[name + ".out"].mean(0), ours[name + ".out"].mean(0), rtol=1e-4, atol=1e-5)


def test_osscar_is_at_least_as_close_to_each_block_as_slicing() -> None:
    source = dense(layers=1)
    pruned = osscar(source, 0.4)
    plan = make_plan(source.measured["OSSCAR"], backbone_ratio=0.4, allocation="uniform")
    sliced = prune(source.model, plan, compensation="none")
    ids = source.calibration.fitted
    name = "0." + OUTPUT_PROJECTION["attention"] + ".out"
    wanted, refitted, cut = (outputs(model, ids)[name] for model in (source.model, pruned, sliced))
    assert float((refitted - wanted).square().sum()) < float((cut - wanted).square().sum())


def test_short_gpt_drops_the_layer_that_changes_least() -> None:
    source = dense()
    quiet = source.model.model.layers[1]
    with torch.no_grad():
        quiet.self_attn.o_proj.weight.zero_()
        quiet.mlp.down_proj.weight.zero_()
    pruned = short_gpt(source, 0.3)
    assert [layer.self_attn is None and layer.mlp is None for layer in pruned.model.layers] == [False, True, False]
    # a layer that added nothing is not missed
    ids = token_ids(2, 8)
    torch.testing.assert_close(pruned(ids).logits, source.model(ids).logits)


def test_llm_pruner_leaves_the_ends_whole_while_the_budget_allows_it() -> None:
    source = dense(layers=5)
    mild = llm_pruner(source, 0.2).model.layers
    sizes = [layer.mlp.down_proj.in_features for layer in mild]
    assert sizes[0] == sizes[-1] == 16 and max(sizes[1:-1]) < 16
    harsh, uniform = llm_pruner(source, 0.7), taylor_uniform(source, 0.7)
    assert all(torch.equal(a, b) for a, b in zip(harsh.parameters(), uniform.parameters(), strict=True))
