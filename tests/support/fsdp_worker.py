"""Run by `test_recovery_launch.py` in two processes: FSDP2 over layers of unequal size equals the unsharded model."""

from __future__ import annotations

import copy
import sys

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_gqaprune import PrunedLlamaConfig, PrunedLlamaForCausalLM
from hf_gqaprune.configuration import RecoveryConfig
from hf_gqaprune.trainer.models import lora_config


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    sizes = {
        "0": {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 7},
        "2": {"skip": ["attention"]},
    }
    config = PrunedLlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=20, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=4, head_dim=4, per_layer_config=sizes, initializer_range=0.2,
    )  # fmt: skip
    base = PrunedLlamaForCausalLM(config)
    whole = get_peft_model(base, lora_config(base, RecoveryConfig(rank=4)))
    for name, parameter in whole.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    sharded = copy.deepcopy(whole)
    for layer in sharded.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(sharded)

    ids = torch.randint(48, (4, 12), generator=torch.Generator().manual_seed(1))
    expected = whole(ids, labels=ids).loss
    expected.backward()
    # each process sees half of the batch; gradients are averaged
    mine = ids[dist.get_rank() :: 2]
    loss = sharded(mine, labels=mine).loss
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    assert dist.get_world_size() == 2
    torch.testing.assert_close(mean / 2, expected.detach())
    trained = {name: p.grad for name, p in whole.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in sharded.named_parameters() if p.requires_grad}
    assert found.keys() == trained.keys() and all(isinstance(grad, DTensor) for grad in found.values())
    for name, grad in found.items():
        torch.testing.assert_close(grad.full_tensor(), trained[name], msg=lambda text, name=name: f"{name}: {text}")
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
