"""Fit each block of a pruned model to the dense model's residual stream, block by block.

Layer by layer, attention then FFN, gradient descent on the trainable weights of one block minimizes the distance between
the pruned and the dense residual stream after the block. The block reads the stream that the blocks fitted before it
produce, so that it corrects their errors instead of adding to them. Only one block of each model runs at a time; both
streams are kept on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..models import BLOCK_MODULES, DecoderInputs

LEARNING_RATE = 3e-3
EPOCHS = 4


@dataclass(frozen=True)
class BlockLoss:
    """Mean squared distance to the dense stream after a block over the stream's mean square, before and after fitting."""

    layer: int
    block: str
    before: float
    after: float


def fit_blocks(
    student: Any,
    dense: Any,
    ids: torch.Tensor,
    *,
    rows: int,
    seed: int,
    learning_rate: float = LEARNING_RATE,
    epochs: int = EPOCHS,
) -> list[BlockLoss]:
    """Fit the trainable parameters of every block of `student`, in place.

    Args:
        student: causal LM, plain or wrapped by peft; only parameters that require gradients are updated.
        dense: the causal LM that `student` was pruned from.
        ids: int64 `(windows, seq_len)`.
        rows: windows per optimizer step.
        learning_rate: initial learning rate of AdamW; a cosine schedule takes it to zero.
        epochs: passes over `ids` for each block.
        seed: seeds the order of the windows.

    Returns:
        One entry per block that has trainable parameters.
    """
    streams = _ResidualStreams(student, dense, ids, rows)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for index, layer in enumerate(streams.decoder.layers):
        for kind, (name, _) in BLOCK_MODULES.items():
            before, after = streams.fit(index, layer, kind, learning_rate, epochs, generator)
            if after is not None:
                losses.append(BlockLoss(index, name, before, after))
    return losses


class _ResidualStreams:
    """Advance the residual streams of both models, `(windows, seq_len, d)` on the CPU, block by block."""

    def __init__(self, student: Any, dense: Any, ids: torch.Tensor, rows: int) -> None:
        self.student = student.get_base_model() if hasattr(student, "get_base_model") else student
        self.decoder, self.dense_decoder = self.student.get_decoder(), dense.get_decoder()
        self.device = self.decoder.embed_tokens.weight.device
        self.rows = rows
        self.windows = len(ids)
        # the two models may compute in different dtypes
        self.decoder_inputs = {
            decoder: DecoderInputs(dense.config, decoder.rotary_emb, ids.shape[1], decoder.embed_tokens.weight.dtype)
            for decoder in (self.decoder, self.dense_decoder)
        }
        with torch.no_grad():
            self.stream = self._map(self.decoder.embed_tokens, ids, self.decoder)
            self.target = self._map(self.dense_decoder.embed_tokens, ids, self.dense_decoder)

    def fit(
        self, index: int, layer: Any, kind: str, rate: float, epochs: int, generator: torch.Generator
    ) -> tuple[float, float | None]:
        """Fit one block and advance both streams; return `(before, after)`, `after` being None if nothing is trainable."""
        dense_layer = self.dense_decoder.layers[index]
        run_dense = self._block(dense_layer, kind, self.dense_decoder)
        with torch.no_grad():
            self.target = self._map(run_dense, self.target, self.dense_decoder)
        block = getattr(layer, BLOCK_MODULES[kind][0])
        if block is None:
            return 0.0, None
        run = self._block(layer, kind, self.decoder)
        trained = [p for p in block.parameters() if p.requires_grad]
        before = after = None
        if trained:
            start = [parameter.detach().clone() for parameter in trained]
            before = self._distance(run)
            self._descend(run, trained, rate, epochs, generator)
            after = self._distance(run)
            if not after < before:
                # a block that fits already has only noise to learn
                for parameter, value in zip(trained, start, strict=True):
                    parameter.data.copy_(value)
                after = before
        with torch.no_grad():
            self.stream = self._map(run, self.stream, self.decoder)
        return before or 0.0, after

    def _descend(
        self, run: Callable[..., torch.Tensor], trained: list[nn.Parameter], rate: float, epochs: int, generator: Any
    ) -> None:
        batches = self.windows // self.rows or 1
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * batches)
        scale = self.target.float().square().mean().to(self.device)
        with torch.enable_grad():
            for _ in range(epochs):
                order = torch.randperm(self.windows, generator=generator)
                for picked in order[: batches * self.rows].split(self.rows):
                    output = run(self.stream[picked].to(self.device))
                    wanted = self.target[picked].to(self.device)
                    loss = (output.float() - wanted.float()).square().mean() / scale
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    nn.utils.clip_grad_norm_(trained, 1.0)
                    optimizer.step()
                    schedule.step()
        for parameter in trained:
            parameter.grad = None

    @torch.no_grad()
    def _distance(self, run: Callable[..., torch.Tensor]) -> float:
        total, square = 0.0, 0.0
        for part in self._parts():
            wanted = self.target[part].to(self.device).float()
            total += float((run(self.stream[part].to(self.device)).float() - wanted).square().sum())
            square += float(wanted.square().sum())
        return total / square

    def _block(self, layer: Any, kind: str, decoder: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return `hidden -> hidden + block(norm(hidden))` of one layer; the identity if the layer has no such block."""
        name, norm_name = BLOCK_MODULES[kind]
        block = getattr(layer, name)
        if block is None:
            return lambda hidden: hidden
        norm, run = getattr(layer, norm_name), self.decoder_inputs[decoder].run_block
        return lambda hidden: hidden + run(kind, block, norm(hidden), decoder.config)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor, decoder: Any) -> torch.Tensor:
        dtype = decoder.embed_tokens.weight.dtype
        return torch.cat([function(values[part].to(self.device)).to(dtype).cpu() for part in self._parts()])

    def _parts(self) -> Iterator[slice]:
        return (slice(start, start + self.rows) for start in range(0, self.windows, self.rows))
