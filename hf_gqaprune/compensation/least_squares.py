"""Refit every linear of a pruned model on the outputs of its pruned prefix."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from ..data import Calibration, refit_batches
from ..errors import WorkError
from ..linalg import cholesky_, exact_products, factors_of_products, gram_strips, mirror_, product, ridge_term, solve_
from ..models import BLOCK_MODULES, INPUT_PROJECTIONS, KINDS, OUTPUT_PROJECTION, DecoderInputs
from ..utils import distributed, track

logger = logging.getLogger(__name__)
#: candidate ridges, ascending, relative to the mean diagonal
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
#: random projections of the outputs that choose a ridge if there are more than twice as many outputs
_SKETCH = 512
#: rows converted or multiplied at once
_ROWS = 512
#: block kind -> its input projections and its output projection, by their names within the block
_LINEARS = {
    kind: tuple(name.rpartition(".")[2] for name in (*INPUT_PROJECTIONS[kind], OUTPUT_PROJECTION[kind])) for kind in KINDS
}


@dataclass
class NormalEquations:
    """Accumulate a least-squares problem min ||T - W X||^2 in float64, on the device of the added rows.

    Attributes:
        gram: sum of x x^T, `(k, k)`.
        cross: sum of t x^T, `(d, k)`.
        energy: sum of t . t, a tensor on the device until `complete`.
    """

    gram: torch.Tensor
    cross: torch.Tensor
    energy: float | torch.Tensor = 0.0

    @staticmethod
    def zeros(outputs: int, inputs: int, device: torch.device) -> NormalEquations:
        """Create empty sums for `outputs` targets and `inputs` features."""
        zeros = functools.partial(torch.zeros, dtype=torch.float64, device=device)
        return NormalEquations(zeros(inputs, inputs), zeros(outputs, inputs))

    def add(self, x: torch.Tensor, t: torch.Tensor) -> None:
        """Add rows of x `(tokens, k)` and t `(tokens, d)`: products in float32, sums in float64; call `complete` after."""
        with exact_products(x.dtype, t.dtype):
            x, t = (factors_of_products(rows.flatten(0, -2)) for rows in (x, t))
            for rows, columns in gram_strips(x):
                self.gram[rows, columns] += product(x[:, rows].T, x[:, columns])
            # the whole product would take half the memory of the sum
            for total, some in zip(self.cross.split(_ROWS), t.split(_ROWS, 1), strict=True):
                total += product(some.T, x)
        self.energy = self.energy + t.float().square().sum(dtype=torch.float64)

    def solve(self, prior: torch.Tensor, ridge: float) -> torch.Tensor:
        """Return argmin_W ||T - W X||^2 + r ||W - prior||^2 with r = `ridge_term(gram, ridge)`: float64 `(d, k)`.

        `prior` is `(d, k)`, any float dtype.
        """
        diagonal = self.gram.diagonal().clone()
        r = ridge_term(self.gram, ridge)
        rows = prior.detach().double().mul(r).add_(self.cross)
        # the factor temporarily replaces the lower triangle
        self.gram.diagonal().add_(r)
        solved = solve_(cholesky_(self.gram), rows)
        self.gram.diagonal().copy_(diagonal)
        mirror_(self.gram, from_upper=True)
        return solved

    def error(self, weight: torch.Tensor) -> float:
        """Compute ||T - W X||^2 from the sums for W = `weight`, `(d, k)`."""
        total = 0.0
        for rows, cross in zip(weight.split(_ROWS), self.cross.split(_ROWS), strict=True):
            total += float(((rows @ self.gram) * rows).sum() - 2 * (rows * cross).sum())
        return total + float(self.energy)

    def complete(self) -> None:
        """Sum over processes and fill the upper triangle of `gram`, after the last `add`."""
        mirror_(self.gram)
        distributed.all_reduce_((self.gram, self.cross))
        self.energy = distributed.all_reduce_scalar(float(self.energy), self.gram)

    def __iadd__(self, other: NormalEquations) -> NormalEquations:
        self.gram += other.gram
        self.cross += other.cross
        self.energy += other.energy
        return self


class ChosenRidge(NamedTuple):
    """Ridge chosen on held-out windows for one projection, such as layer 3's `o_proj`."""

    layer: int
    projection: str
    ridge: float


def ridge_record(ridges: Iterable[ChosenRidge]) -> dict[str, float]:
    """Name each chosen ridge for `gqaprune.json`: `{"3.o_proj": 0.01}`."""
    return {f"{each.layer}.{each.projection}": each.ridge for each in ridges}


def refit_on_pruned_prefix(model: Any, pruned: Any, calibration: Calibration) -> list[ChosenRidge]:
    """Refit every linear of the decoder layers of `pruned` in place, so that it follows `model`.

    In each block the input projections are fitted to the outputs of the dense projections, then the output projection
    to the dense residual stream after the block, both by ridge regression towards the current weights. Inputs are those
    of the pruned and refitted prefix, so the target includes its accumulated error (error accumulation as in
    Tyr-the-Pruner, arXiv:2503.09657, and SparseLLM). Blocks before the first difference keep their weights bit for bit.

    Args:
        model: the dense causal LM.
        pruned: the pruned causal LM; its weights change.
        calibration: windows; the ridges are chosen on `held_out`, and all windows are then fitted.

    Returns:
        The ridge chosen for each refitted projection.

    Raises:
        WorkError: activations that are not finite, by layer and block.
    """
    embed = model.get_input_embeddings()
    fitted, held = (distributed.shard(windows) for windows in (calibration.fitted, calibration.held_out))
    ids, held_out = refit_batches(fitted, held, model.config.vocab_size, embed.weight.device)
    with torch.no_grad():
        hidden = [embed(batch.to(embed.weight.device)) for batch in ids]
    inputs = DecoderInputs(model.config, model.get_decoder().rotary_emb, calibration.ids.shape[1], embed.weight.dtype)
    streams = ResidualStreams(hidden, hidden, held_out, inputs, pruned.config)
    dense_layers, pruned_layers = model.get_decoder().layers, pruned.get_decoder().layers
    pairs = list(zip(dense_layers, pruned_layers, strict=True))
    for index, (dense_layer, layer) in enumerate(track(pairs, "refitting", "layer")):
        some = next(dense_layer.parameters(), None)
        if some is None:
            continue
        streams.to(some.device)
        for kind in KINDS:
            streams.refit_block(index, kind, dense_layer, layer)
    return streams.ridges


Stream = Iterable[torch.Tensor]


class ResidualStreams:
    """The residual streams of the dense and the pruned model, one tensor per batch, advanced block by block.

    Attributes:
        differs: whether the two streams differ; the next block is then refitted even if its sizes are the same.
        ridges: the ridges chosen so far.
    """

    def __init__(
        self,
        dense: Stream,
        pruned: Stream,
        held_out: Sequence[bool],
        inputs: DecoderInputs,
        config: Any,
        keep: Callable[[Stream], Stream] = list,
        differs: bool = False,
    ) -> None:
        """Start before a layer.

        Args:
            dense: hidden states `(windows, seq_len, hidden)` of each batch in the dense model.
            pruned: the same in the pruned model.
            held_out: which batches choose the ridges.
            inputs: position embeddings and masks of the dense model.
            config: of the pruned model.
            keep: stores a new stream so that it can be iterated over repeatedly.
            differs: whether `dense` and `pruned` differ.
        """
        self.dense, self.pruned, self.held_out = dense, pruned, held_out
        self.inputs, self.keep, self.differs = inputs, keep, differs
        self.configs = (inputs.config, config)
        self.ridges: list[ChosenRidge] = []
        self._block = 0, ""

    def to(self, device: torch.device) -> None:
        """Move streams that are in memory to the device of the next layers."""
        if self.inputs.positions.device == device:
            return
        self.inputs = self.inputs.to(device)
        same = self.dense is self.pruned
        self.dense = [hidden.to(device) for hidden in self.dense]
        self.pruned = self.dense if same else [hidden.to(device) for hidden in self.pruned]

    @torch.no_grad()
    def refit_block(self, index: int, kind: str, dense_layer: Any, layer: Any) -> None:
        """Refit one block if the streams or its sizes differ, and advance both streams past it."""
        self._block = index, kind
        (name, norm), (*inputs, output) = BLOCK_MODULES[kind], _LINEARS[kind]
        if getattr(dense_layer, name) is None:
            return
        dense_block, dense_norm = getattr(dense_layer, name), getattr(dense_layer, norm)
        targets = self.keep(self._run(kind, dense_block, dense_norm(h), 0) + h for h in self.dense)
        block = getattr(layer, name)
        if block is None:
            self.dense, self.differs = targets, True
            return
        new_norm = getattr(layer, norm)
        changed = getattr(block, output).weight.shape != getattr(dense_block, output).weight.shape
        if self.differs:
            self._fit_inputs(dense_block, dense_norm, block, new_norm, inputs)
        self.differs |= changed
        if self.differs:
            self._fit_output(kind, output, block, new_norm, targets)
            self.pruned = self.keep(self._run(kind, block, new_norm(h), 1) + h for h in self.pruned)
        else:
            self.pruned = targets
        self.dense = targets

    def _run(self, kind: str, block: nn.Module, hidden: torch.Tensor, which: int) -> torch.Tensor:
        return self.inputs.run_block(kind, block, hidden, self.configs[which])

    def _fit_inputs(
        self, dense_block: Any, dense_norm: nn.Module, block: Any, norm: nn.Module, names: Sequence[str]
    ) -> None:
        """Fit the kept rows of the input projections to their dense outputs."""
        first = block.get_submodule(names[0])
        width, device = first.in_features, first.weight.device
        sums = [NormalEquations.zeros(width, width, device) for _ in range(2)]
        for dense, pruned, is_held in zip(self.dense, self.pruned, self.held_out, strict=True):
            sums[is_held].add(norm(pruned), dense_norm(dense))
        for total in sums:
            total.complete()
        linears = {name: block.get_submodule(name) for name in names}
        ridges = {}
        for name, linear in linears.items():
            # T = W a for the dense inputs a, so its sums follow from those of a
            probe = _sketched(linear.weight)
            fit, held = (NormalEquations(total.gram, probe @ total.cross) for total in sums)
            ridges[name] = self._ridge(fit, held, probe, name)
        fit, held = sums
        fit += held
        # the solution is linear in W: one solution for the identity serves all linears
        identity = torch.eye(width, device=device)
        solutions = {ridge: fit.solve(identity, ridge) for ridge in dict.fromkeys(ridges.values())}
        for name, linear in linears.items():
            linear.weight.data.copy_(linear.weight.double() @ solutions[ridges[name]])

    def _fit_output(self, kind: str, name: str, block: nn.Module, norm: nn.Module, targets: Stream) -> None:
        """Fit the output projection to the dense residual stream after the block."""
        linear: Any = block.get_submodule(name)
        sums = [NormalEquations.zeros(linear.out_features, linear.in_features, linear.weight.device) for _ in range(2)]
        bias = 0 if linear.bias is None else linear.bias
        # without its output projection a block returns the inputs of that projection
        setattr(block, name, nn.Identity())
        try:
            for target, pruned, is_held in zip(targets, self.pruned, self.held_out, strict=True):
                sums[is_held].add(self._run(kind, block, norm(pruned), 1), target - pruned - bias)
        finally:
            setattr(block, name, linear)
        for total in sums:
            total.complete()
        fit, held = (NormalEquations(total.gram, _sketched(total.cross)) for total in sums)
        ridge = self._ridge(fit, held, _sketched(linear.weight), name)
        fit, held = sums
        fit += held
        linear.weight.data.copy_(fit.solve(linear.weight, ridge))

    def _ridge(self, fit: NormalEquations, held: NormalEquations, prior: torch.Tensor, name: str) -> float:
        """Choose, log and record the ridge of one projection of the current block."""
        index, kind = self._block
        for total in (fit, held):
            if not math.isfinite(float(total.gram.diagonal().sum() + total.cross.sum())):
                raise WorkError(
                    f"layer {index} {kind}: activations overflow while it is refitted: load the model in float32 or bfloat16"
                )
        ridge = best_ridge(fit, held, prior)
        logger.info("layer %d %s: ridge %g", index, name, ridge)
        self.ridges.append(ChosenRidge(index, name, ridge))
        return ridge


def _sketched(rows: torch.Tensor) -> torch.Tensor:
    """Project `rows` on `_SKETCH` fixed random directions, or return all of them if they are not many more; float64.

    The squared norm of anything linear in the rows, such as an error, is preserved in expectation, with a relative
    standard deviation of at most sqrt(2 / `_SKETCH`) = 1/16 (Johnson & Lindenstrauss 1984) that all ridges share.
    """
    rows, count = rows.detach().double(), len(rows)
    if count <= 2 * _SKETCH:
        return rows
    generator = torch.Generator(rows.device).manual_seed(0)
    sums = torch.randn(_SKETCH, count, generator=generator, dtype=torch.float64, device=rows.device)
    return sums.div_(math.sqrt(_SKETCH)) @ rows


def best_ridge(fit: NormalEquations, held: NormalEquations, prior: torch.Tensor) -> float:
    """Return the ridge whose solution for `fit` has the lowest error on `held`; the `energy` of both may be zero.

    The search descends from the two middle ridges, so it may miss a second minimum of the error.
    """
    if not bool(held.gram.any()):
        return RIDGES[len(RIDGES) // 2]
    low, high = (held.error(fit.solve(prior, ridge)) for ridge in RIDGES[1:3])
    best, beyond = (RIDGES[1], RIDGES[0]) if low <= high else (RIDGES[2], RIDGES[3])
    return beyond if held.error(fit.solve(prior, beyond)) < min(low, high) else best
