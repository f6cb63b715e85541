"""The benchmark that merges KV groups: groups that hold the same are merged without loss."""

from __future__ import annotations

import pytest
import torch
from support.tiny import tiny_llama, token_ids
from units import Trial, _merge_model

from hf_gqaprune import Calibration


@pytest.mark.parametrize("turned", [False, True])
def test_groups_that_hold_the_same_are_merged_without_loss(turned: bool) -> None:
    """Of four groups 2 and 3 repeat 0 and 1; turned, their values are mixed and their keys rotated and twice as long."""
    model = tiny_llama(kv_heads=4, n_rep=2, layers=2)
    mix = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for layer in model.model.layers:
            k, v = (linear.weight.view(4, 8, -1) for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj))
            k[2:], v[2:] = k[:2], v[:2]
            if turned:
                # a quarter turn of every rotary pair (i, i + 4)
                k[2:] = 2 * torch.cat([-k[:2, 4:], k[:2, :4]], 1)
                v[2:] = mix @ v[:2]
    trial = Trial(model, Calibration.from_ids(token_ids(16, 12)))
    ids = token_ids(2, 9, seed=5)
    with torch.no_grad():
        dense = model(ids).logits
        for least_squares in (True, False):
            merged = _merge_model(trial, least_squares)
            assert merged.config.per_layer_config[0].num_key_value_heads == 2
            error = float((merged(ids).logits - dense).abs().max() / dense.abs().max())
            assert error < 1e-3 if least_squares or not turned else error > 1e-2
