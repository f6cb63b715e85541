"""Blocks of the pruned model are fitted to the dense ones, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from support.tiny import tiny_llama, token_ids

from hf_gqaprune import make_plan, prune
from hf_gqaprune.trainer.blockwise import fit_blocks


def test_blocks_of_the_pruned_model_move_towards_the_dense_ones() -> None:
    dense = tiny_llama(layers=3)
    plan = make_plan(model=dense, backbone_ratio=0.3, criterion="magnitude")
    student = prune(dense, plan, compensation="none")
    ids = token_ids(24, 12)
    before = copy.deepcopy(dense.state_dict())
    found = fit_blocks(student, dense, ids, rows=8, learning_rate=1e-2, epochs=6, seed=0)
    assert all(block.after < block.before for block in found if block.before > 1e-9)
    assert all(block.after <= block.before for block in found) and found[-1].before > 1e-3
    assert [(block.layer, block.block) for block in found] == [
        (i, block)
        for i, layer in enumerate(student.model.layers)
        for block in ("self_attn", "mlp")
        if getattr(layer, block) is not None
    ]
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    # the last distance is that of the whole models' streams
    ends: list[torch.Tensor] = []
    with torch.no_grad():
        for model in (student, dense):
            hook = model.model.norm.register_forward_pre_hook(lambda _m, args: ends.append(args[0]))
            model(ids)
            hook.remove()
    distance = (ends[0] - ends[1]).square().sum() / ends[1].square().sum()
    assert found[-1].after == pytest.approx(float(distance), rel=1e-4)


def test_reconstruction_changes_only_what_trains() -> None:
    from peft import LoraConfig, get_peft_model

    dense = tiny_llama()
    student = get_peft_model(copy.deepcopy(dense), LoraConfig(r=2, target_modules=["down_proj"]))
    with torch.no_grad():
        student.base_model.model.model.layers[0].mlp.up_proj.weight[0] = 0
    before = {name: p.clone() for name, p in student.named_parameters()}
    fit_blocks(student, dense, token_ids(8, 12), rows=4, learning_rate=1e-2, epochs=2, seed=0)
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name for name in changed)


@pytest.mark.parametrize(("student_dtype", "dense_dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_the_dense_model_may_compute_in_another_dtype(student_dtype: torch.dtype, dense_dtype: torch.dtype) -> None:
    dense = tiny_llama()
    plan = make_plan(model=dense, backbone_ratio=0.3, criterion="magnitude")
    student = prune(dense, plan, compensation="none").to(student_dtype)
    found = fit_blocks(student, dense.to(dense_dtype), token_ids(16, 12), rows=8, learning_rate=1e-2, epochs=2, seed=0)
    assert found[-1].after < found[-1].before
    assert {parameter.dtype for parameter in student.parameters()} == {student_dtype}
