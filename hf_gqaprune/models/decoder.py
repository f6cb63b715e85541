"""Run the decoder layers of a model one at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class DecoderInputs:
    """Position embeddings and causal masks for unpadded windows of one length."""

    def __init__(self, config: Any, rotary: nn.Module, seq_len: int, dtype: torch.dtype) -> None:
        device = next(rotary.buffers()).device
        self.config = config
        self.positions = torch.arange(seq_len, device=device)[None]
        self.rope = rotary(torch.empty(0, dtype=dtype, device=device), self.positions)
        self._masks: dict[tuple[object, ...], torch.Tensor | None] = {}

    def to(self, device: torch.device) -> DecoderInputs:
        """Return a copy on another device."""
        moved = copy.copy(self)
        moved.positions = self.positions.to(device)
        moved.rope = tuple(part.to(device) for part in self.rope)
        moved._masks = {}
        return moved

    def mask(self, hidden: torch.Tensor, config: Any = None) -> torch.Tensor | None:
        """Return the causal mask for `hidden`, or None if the attention implementation needs none."""
        from transformers.masking_utils import create_causal_mask

        config = config or self.config
        key = (config._attn_implementation, hidden.shape[0], hidden.dtype)
        if key not in self._masks:
            # no attention mask and no cache, whose name differs between versions of transformers
            self._masks[key] = create_causal_mask(config, hidden, None, None, position_ids=self.positions)
        return self._masks[key]

    def run(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Run a decoder layer: `(windows, seq_len, hidden)` -> the same."""
        output: torch.Tensor = layer(
            hidden,
            attention_mask=self.mask(hidden),
            position_embeddings=self.rope,
            position_ids=self.positions,
            use_cache=False,
        )
        return output

    def run_block(self, kind: str, block: nn.Module, hidden: torch.Tensor, config: Any = None) -> torch.Tensor:
        """Return the output of the attention or FFN `block` for normalised hidden states `(windows, seq_len, hidden)`."""
        if kind == "mlp":
            output: torch.Tensor = block(hidden)
        else:
            mask = self.mask(hidden, config)
            output = block(hidden_states=hidden, position_embeddings=self.rope, attention_mask=mask)[0]
        return output


@contextmanager
def materialized(layer: nn.Module, state: dict[str, torch.Tensor]) -> Iterator[None]:
    """Load weights into a meta layer, in eval mode and without gradients, and release them when the block ends."""
    layer.load_state_dict(state, assign=True)
    layer.eval().requires_grad_(False)
    try:
        yield
    finally:
        layer.to("meta")


def empty_model(config: Any) -> PreTrainedModel:
    """Build the model of `config` on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def expected_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the tensors that a checkpoint of `model` stores, in order: all but tied ones."""
    return {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}


def layer_prefix(index: int) -> str:
    """Return the prefix of the names of a decoder layer's tensors."""
    return f"model.layers.{index}."
