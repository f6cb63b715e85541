"""A dense and a pruned model and calibration windows go in; the pruned linears, re-fitted layer by layer, come out.

Both models are walked together, one decoder layer at a time. Every linear of the pruned model is re-fitted on the
inputs that it really gets, those of the already pruned and re-fitted prefix, so that errors do not accumulate.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..data import Calibration, refit_batches
from ..errors import WorkError
from ..linalg import cholesky_, exact_products, factors_of_products, gram_strips, mirror_, product, solve_
from ..models import DecoderInputs
from ..utils import distributed

#: ridges that are tried, rising, relative to the mean diagonal
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
#: outputs that a ridge is chosen by, where there are more than twice as many
_SKETCH = 512
#: rows that are converted or multiplied at once
_ROWS = 512
_BLOCKS = {
    "attention": ("self_attn", "input_layernorm", ("q_proj", "k_proj", "v_proj"), "o_proj"),
    "mlp": ("mlp", "post_attention_layernorm", ("gate_proj", "up_proj"), "down_proj"),
}


@dataclass
class NormalEquations:
    """Sums of a least-squares problem min ||T - W X||^2, float64, on the device of the rows that are added.

    Attributes:
        gram: sum of x x^T, `(k, k)`.
        cross: sum of t x^T, `(d, k)`.
        energy: sum of t . t, on the device until `complete`.
    """

    gram: torch.Tensor
    cross: torch.Tensor
    energy: float | torch.Tensor = 0.0

    @staticmethod
    def zeros(outputs: int, inputs: int, device: torch.device) -> NormalEquations:
        """Nothing summed yet."""
        zeros = functools.partial(torch.zeros, dtype=torch.float64, device=device)
        return NormalEquations(zeros(inputs, inputs), zeros(outputs, inputs))

    def add(self, x: torch.Tensor, t: torch.Tensor) -> None:
        """Add rows of x `(tokens, k)` and t `(tokens, d)`, products in float32, sums in float64; `complete` comes after."""
        with exact_products(x.dtype, t.dtype):
            x, t = (factors_of_products(rows.flatten(0, -2)) for rows in (x, t))
            for rows, columns in gram_strips(x):
                self.gram[rows, columns] += product(x[:, rows].T, x[:, columns])
            # a whole product would take half of what the sum does
            for total, some in zip(self.cross.split(_ROWS), t.split(_ROWS, 1), strict=True):
                total += product(some.T, x)
        self.energy = self.energy + t.float().square().sum(dtype=torch.float64)

    def solve(self, prior: torch.Tensor, ridge: float) -> torch.Tensor:
        """argmin_W ||T - W X||^2 + r ||W - prior||^2 with r = ridge * mean(diag(gram)): float64 `(d, k)`.

        `prior` is `(d, k)` of any float dtype.
        """
        diagonal = self.gram.diagonal().clone()
        scale = float(diagonal.mean())
        r = ridge * scale if scale > 0 else 1.0
        rows = prior.detach().double().mul(r).add_(self.cross)
        # the factor lies in the lower triangle only while it is needed
        self.gram.diagonal().add_(r)
        solved = solve_(cholesky_(self.gram), rows)
        self.gram.diagonal().copy_(diagonal)
        mirror_(self.gram, from_upper=True)
        return solved

    def error(self, weight: torch.Tensor) -> float:
        """||T - W X||^2 from the sums alone."""
        total = 0.0
        for rows, cross in zip(weight.split(_ROWS), self.cross.split(_ROWS), strict=True):
            total += float(((rows @ self.gram) * rows).sum() - 2 * (rows * cross).sum())
        return total + float(self.energy)

    def complete(self) -> None:
        """Nothing more is added: sum over processes, and give `gram`, of which there is half, the other half."""
        mirror_(self.gram)
        distributed.all_reduce_((self.gram, self.cross))
        self.energy = distributed.all_reduce_scalar(float(self.energy), self.gram)

    def __iadd__(self, other: NormalEquations) -> NormalEquations:
        self.gram += other.gram
        self.cross += other.cross
        self.energy += other.energy
        return self


def refit_on_pruned_prefix(model: Any, pruned: Any, calibration: Calibration) -> None:
    """Re-fit every linear of the decoder layers of `pruned`, in place, so that it follows `model`.

    In each block the input projections are fitted to the dense projections' outputs, then the output projection to the
    dense residual stream after the block, both as ridge regression towards the weights that are there: the accumulated
    error of the prefix is part of the target (error accumulation as in Tyr-the-Pruner, arXiv:2503.09657, and SparseLLM).
    Blocks before the first difference are left untouched, bit for bit.

    Args:
        model: the dense causal LM.
        pruned: the pruned causal LM; its weights change.
        calibration: windows; one in eight is held out to choose the ridges and then fitted too.

    Raises:
        WorkError: activations that are not finite, by layer and block.
    """
    from tqdm.auto import tqdm

    embed = model.get_input_embeddings()
    fitted, held = (distributed.shard(windows) for windows in (calibration.fitted, calibration.held_out))
    ids, held_out = refit_batches(fitted, held, model.config.vocab_size, embed.weight.device)
    with torch.no_grad():
        hidden = [embed(batch.to(embed.weight.device)) for batch in ids]
    decoder_inputs = DecoderInputs(
        model.config, model.get_decoder().rotary_emb, calibration.ids.shape[1], embed.weight.dtype
    )
    walk = Walk(hidden, hidden, held_out, decoder_inputs, pruned.config)
    differs = False
    dense_layers, pruned_layers = model.get_decoder().layers, pruned.get_decoder().layers
    pairs = list(zip(dense_layers, pruned_layers, strict=True))
    for index, (dense_layer, layer) in enumerate(tqdm(pairs, desc="re-fitting", unit="layer", disable=None, leave=False)):
        some = next(dense_layer.parameters(), None)
        if some is None:
            continue
        walk.go_to(some.device)
        for kind in _BLOCKS:
            differs = walk.block(index, kind, dense_layer, layer, differs)


Stream = Iterable[torch.Tensor]


class Walk:
    """The residual streams of both models, one tensor per batch, advanced block by block."""

    def __init__(
        self,
        dense: Stream,
        pruned: Stream,
        held_out: Sequence[bool],
        decoder_inputs: DecoderInputs,
        config: Any,
        keep: Callable[[Stream], Stream] = list,
    ) -> None:
        """Begin in front of a layer.

        Args:
            dense: hidden states `(windows, seq_len, hidden)` of each batch in the dense model.
            pruned: the same in the pruned model.
            held_out: which batches choose the ridges.
            decoder_inputs: of the dense model.
            config: of the pruned model.
            keep: makes of new streams something that can be gone through again.
        """
        self.dense, self.pruned, self.held_out = dense, pruned, held_out
        self.decoder_inputs, self.keep = decoder_inputs, keep
        self.configs = (decoder_inputs.config, config)
        self.where = ""

    def go_to(self, device: torch.device) -> None:
        """Move streams that are in memory to the device of the layers that come."""
        if self.decoder_inputs.positions.device == device:
            return
        self.decoder_inputs = self.decoder_inputs.to(device)
        both_are_one = self.dense is self.pruned
        self.dense = [hidden.to(device) for hidden in self.dense]
        self.pruned = self.dense if both_are_one else [hidden.to(device) for hidden in self.pruned]

    @torch.no_grad()
    def block(self, index: int, kind: str, dense_layer: Any, layer: Any, differs: bool) -> bool:
        """Re-fit one block if the streams or the sizes differ, advance both streams; return whether they now differ."""
        self.where = f"layer {index} {kind}"
        name, norm, inputs, output = _BLOCKS[kind]
        if getattr(dense_layer, name) is None:
            return differs
        dense_block, dense_norm = getattr(dense_layer, name), getattr(dense_layer, norm)
        targets = self.keep(self._run(kind, dense_block, dense_norm(h), 0) + h for h in self.dense)
        block = getattr(layer, name)
        if block is None:
            self.dense = targets
            return True
        new_norm = getattr(layer, norm)
        changed = getattr(block, output).weight.shape != getattr(dense_block, output).weight.shape
        if differs:
            self._fit_inputs(dense_block, dense_norm, block, new_norm, inputs)
        if differs or changed:
            self._fit_output(kind, output, block, new_norm, targets)
        if differs or changed:
            self.pruned = self.keep(self._run(kind, block, new_norm(h), 1) + h for h in self.pruned)
        else:
            self.pruned = targets
        self.dense = targets
        return differs or changed

    def _run(self, kind: str, block: nn.Module, hidden: torch.Tensor, which: int) -> torch.Tensor:
        if kind == "mlp":
            return block(hidden)
        mask = self.decoder_inputs.mask(hidden, self.configs[which])
        return block(hidden_states=hidden, position_embeddings=self.decoder_inputs.rope, attention_mask=mask)[0]

    def _fit_inputs(
        self, dense_block: Any, dense_norm: nn.Module, block: Any, norm: nn.Module, names: Sequence[str]
    ) -> None:
        """Fit the input projections: the pruned rows of each should give, on the pruned stream, what they gave before."""
        first = block.get_submodule(names[0])
        width, device = first.in_features, first.weight.device
        sums = [NormalEquations.zeros(width, width, device) for _ in range(2)]
        for dense, pruned, is_held in zip(self.dense, self.pruned, self.held_out, strict=True):
            sums[is_held].add(norm(pruned), dense_norm(dense))
        for total in sums:
            total.complete()
        linears = [block.get_submodule(name) for name in names]
        ridges = []
        for linear in linears:
            # T = W a for the dense inputs a, so its sums follow from those of a
            probe = _sketched(linear.weight)
            fit, held = (NormalEquations(total.gram, probe @ total.cross) for total in sums)
            ridges.append(_ridge(fit, held, probe, self.where))
        fit, held = sums
        fit += held
        # the solution is linear in W: one of the identity serves all linears, W M in place of a solution each
        identity = torch.eye(width, device=device)
        solutions = {ridge: fit.solve(identity, ridge) for ridge in dict.fromkeys(ridges)}
        for linear, ridge in zip(linears, ridges, strict=True):
            _assign(linear, linear.weight.double() @ solutions[ridge])

    def _fit_output(self, kind: str, name: str, block: nn.Module, norm: nn.Module, targets: Stream) -> None:
        """Fit the output projection to the dense residual stream after the block."""
        linear: Any = block.get_submodule(name)
        sums = [NormalEquations.zeros(linear.out_features, linear.in_features, linear.weight.device) for _ in range(2)]
        bias = 0 if linear.bias is None else linear.bias
        # without its projection a block returns what goes into it
        setattr(block, name, nn.Identity())
        try:
            for target, pruned, is_held in zip(targets, self.pruned, self.held_out, strict=True):
                sums[is_held].add(self._run(kind, block, norm(pruned), 1), target - pruned - bias)
        finally:
            setattr(block, name, linear)
        for total in sums:
            total.complete()
        fit, held = (NormalEquations(total.gram, _sketched(total.cross)) for total in sums)
        ridge = _ridge(fit, held, _sketched(linear.weight), self.where)
        fit, held = sums
        fit += held
        _assign(linear, fit.solve(linear.weight, ridge))


def _sketched(rows: torch.Tensor) -> torch.Tensor:
    """`_SKETCH` random sums of `rows`, always the same ones, or all of them where they are not many more; float64.

    The squared norm of what is linear in the rows, such as an error, stays the same in expectation, with a relative
    standard deviation of at most sqrt(2 / `_SKETCH`) = 1/16 (Johnson & Lindenstrauss 1984), which two ridges share.
    """
    rows, count = rows.detach().double(), len(rows)
    if count <= 2 * _SKETCH:
        return rows
    generator = torch.Generator(rows.device).manual_seed(0)
    sums = torch.randn(_SKETCH, count, generator=generator, dtype=torch.float64, device=rows.device)
    return sums.div_(math.sqrt(_SKETCH)) @ rows


def _ridge(fit: NormalEquations, held: NormalEquations, prior: torch.Tensor, where: str) -> float:
    """The ridge whose solution for `fit` has the least error on `held`, `energy` left out.

    From the middle ones the search goes down: an error that falls and rises with the ridge twice may hide a lesser one.
    Raises [`WorkError`], saying `where`, for sums that are not finite.
    """
    if not all(math.isfinite(float(s.gram.diagonal().sum() + s.cross.sum())) for s in (fit, held)):
        raise WorkError(f"{where}: activations overflow while it is re-fitted: load the model in float32 or bfloat16")
    if not bool(held.gram.any()):
        return RIDGES[len(RIDGES) // 2]
    low, high = (held.error(fit.solve(prior, ridge)) for ridge in RIDGES[1:3])
    best, beyond = (RIDGES[1], RIDGES[0]) if low <= high else (RIDGES[2], RIDGES[3])
    return beyond if held.error(fit.solve(prior, beyond)) < min(low, high) else best


def _assign(linear: nn.Linear, weight: torch.Tensor) -> None:
    linear.weight.data.copy_(weight)
