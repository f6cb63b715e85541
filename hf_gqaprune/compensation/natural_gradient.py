"""Move a pruned model towards the dense model's predictions by natural-gradient steps.

The layer-wise refit matches activations; these steps match what the activations are for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..data import LOGITS_PER_BATCH, Calibration
from ..errors import WorkError
from ..linalg import fill_, invert_, ridge_term
from ..models import ModelShape, eval_without_grad, kl_divergence
from ..statistics import RIDGE
from ..utils import CPU, Progress, distributed

logger = logging.getLogger(__name__)

#: maximum number of passes over the fitted windows; each costs about as much as the calibration pass
_PASSES = 6
#: tokens per step, and minimum number of steps per pass
_TOKENS, _STEPS = 4096, 16
#: batches that the curvature and the first step length are measured on
_MEASURED = 32
#: fraction of the best length for the mean gradient: gradients of single batches are noisier
_CAUTION = 0.5
#: the last pass is the one that lowers the held-out divergence by less than this fraction
_GAIN = 1e-3
#: a pass that does not lower it is undone and repeated with this fraction of the length, at most so many times
_SHORTER, _RETRIES = 0.25, 3
#: decay of the running mean of the gradients
_MOMENTUM = 0.9
#: divergence, in nats per token, of the probe that a quadratic form is read from, and the probes tried to reach it
_NEAR, _TRIES = 1e-3, 8
_TINY = torch.finfo(torch.float32).tiny
_NOTHING = "no step towards the dense model's predictions helped: the model stays as it was refitted"


@dataclass(frozen=True)
class Pass:
    """One pass over the fitted windows.

    Attributes:
        length: of its longest step; lengths fall to zero over all passes.
        before, after: KL(dense || pruned) on the held-out windows, in nats per token.
        kept: whether its steps were kept or undone.
    """

    length: float
    before: float
    after: float
    kept: bool


def steps_peak_bytes(shape: ModelShape) -> int:
    """Estimate the memory that the steps take beside the dense model, for a pruned model of these sizes.

    Every linear has its weight, gradient and running mean, and two factors, all in float32; activations are left out.
    """
    total = 0
    for layer in shape.layers:
        d, query, kv = shape.hidden_size, layer.query_heads * layer.head_dim, layer.kv_heads * layer.head_dim
        linears = [(query, d), (kv, d), (kv, d), (d, query), (layer.ffn, d), (layer.ffn, d), (d, layer.ffn)]
        total += sum(4 * (3 * rows * columns + rows**2 + columns**2) for rows, columns in linears if rows and columns)
    return total


def natural_gradient_steps(model: Any, pruned: Any, calibration: Calibration) -> list[Pass]:
    """Move every linear of the decoder layers of `pruned`, in place, down KL(dense || pruned).

    A step is W <- W - s G^-1 M A^-1 with M the running mean of the gradient of the divergence on a few windows, and A and G
    the Kronecker factors of the Fisher, F = E[vec(g) vec(g)^T] ~ A (x) G (Martens & Grosse 2015, arXiv:1503.05671), with g
    the gradient of a batch's log-likelihood, next tokens drawn from the dense model: G = E[g g^T] and A = E[g^T g] / tr G,
    the first step of the power iteration towards the nearest Kronecker product (Van Loan & Pitsianis 1993). Computed from
    gradients of whole weights, not of single tokens, they include the correlation between the positions of a window.

    The first s minimises the quadratic model along the first direction P, <D, P> / <P, F P> (section 6.4 there). D is the
    gradient on held-out windows, which noise in P cannot lower, and P^T F P = 2 KL(p_W || p_{W - e P}) / e^2 for a small e.
    s falls to zero over all passes.

    Args:
        model: the dense causal LM; unchanged.
        pruned: the pruned causal LM, changed in place on its device; half-precision weights are float32 during the steps.
        calibration: gradients come from `fitted`, and a pass is kept if it lowers the divergence on `held_out`. Without
            held-out windows (fewer than 8 in all) no step is taken, with a warning.

    Returns:
        The result of each pass, undone ones included.

    Raises:
        WorkError: a divergence that is not finite before the first step.
    """
    if not len(calibration.held_out):
        logger.warning(
            "no step towards the dense model's predictions was taken: %d windows leave none to measure it on, give 8 or more",
            len(calibration.ids),
        )
        return []
    held_out = Predictions.of(model, calibration.held_out)
    best = _divergence(held_out, pruned)
    if best != best:
        raise WorkError("the divergence of the pruned model from the dense one is not a number: activations overflow")
    if not best:
        return []  # both models predict the same
    fitted = Predictions.of(model, calibration.fitted, _STEPS)
    with eval_without_grad(pruned), _in_float32(pruned):
        return _Descent(pruned, fitted, held_out, calibration.seed).run()


@dataclass(frozen=True)
class Predictions:
    """The dense model's predictions on batches of windows.

    Its last hidden states are kept on the CPU, `tokens x hidden_size` values, and its head is applied at each use.

    Attributes:
        batches: int64 `(windows, seq_len)` each, this process's share of a batch, possibly empty.
        hidden: `(windows, seq_len, hidden_size)` each.
        sizes: tokens of each batch, over all processes.
        head: maps hidden states to logits.
    """

    batches: list[torch.Tensor]
    hidden: list[torch.Tensor]
    sizes: list[int]
    head: nn.Linear

    @staticmethod
    @torch.no_grad()
    def of(model: Any, windows: torch.Tensor, count: int = 1) -> Predictions:
        """Run the dense model once over `windows`, int64 `(samples, seq_len)`, in at least `count` batches."""
        tokens = min(_TOKENS, LOGITS_PER_BATCH // model.config.vocab_size, windows.numel() // count)
        whole = windows.split(max(1, tokens // windows.shape[1]))
        batches = [distributed.shard(ids) for ids in whole]
        device = model.get_input_embeddings().weight.device
        decoder = model.get_decoder()
        hidden = [
            decoder(input_ids=ids.to(device), use_cache=False).last_hidden_state.cpu() if len(ids) else torch.empty(0)
            for ids in batches
        ]
        return Predictions(batches, hidden, [ids.numel() for ids in whole], model.get_output_embeddings())

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ids and float32 log-probabilities `(windows, seq_len, vocabulary)` of a batch."""
        device = self.head.weight.device
        if not len(self.batches[index]):
            return self.batches[index], torch.empty(0)
        with torch.no_grad():
            log_probs = self.head(self.hidden[index].to(device)).float().log_softmax(-1)
        return self.batches[index].to(device), log_probs

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield all batches in which this process has a window."""
        return (self[index] for index, ids in enumerate(self.batches) if len(ids))


@contextmanager
def _in_float32(pruned: Any) -> Iterator[None]:
    """Hold half-precision weights in float32, since a step is smaller than their last digit."""
    dtypes = {weight: weight.dtype for weight in pruned.parameters()}
    for weight in dtypes:
        weight.data = weight.data.float()
    try:
        yield
    finally:
        for weight, dtype in dtypes.items():
            weight.data = weight.data.to(dtype)


class _Curvature:
    """The Kronecker factors of one weight `(d, n)`: summed over batches, then inverted in place."""

    def __init__(self, weight: torch.Tensor) -> None:
        rows, columns = weight.shape
        self.outputs = torch.zeros(rows, rows, device=weight.device)
        self.inputs = torch.zeros(columns, columns, device=weight.device)

    def add(self, gradient: torch.Tensor) -> None:
        self.outputs.addmm_(gradient, gradient.T)
        self.inputs.addmm_(gradient.T, gradient)

    def invert(self, tokens: int) -> None:
        """Replace the sums by (G + rI)^-1 and (A + rI)^-1, with r relative to each mean diagonal."""
        self.inputs = _inverse(self.inputs / self.outputs.trace().clamp(min=_TINY))
        self.outputs = _inverse(self.outputs / tokens)

    def direction(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return G^-1 D A^-1 for the gradient D."""
        return self.outputs @ gradient @ self.inputs


def _inverse(matrix: torch.Tensor) -> torch.Tensor:
    """Invert a symmetric matrix plus its ridge in float64; the result is float32."""
    wide = matrix.double()
    wide.diagonal().add_(ridge_term(wide, RIDGE))
    return fill_(invert_(wide)).float()


class _Descent:
    """Stochastic natural-gradient descent from the current weights."""

    def __init__(self, pruned: Any, fitted: Predictions, held_out: Predictions, seed: int) -> None:
        self.pruned, self.fitted, self.held_out, self.seed = pruned, fitted, held_out, seed
        layers = pruned.get_decoder().layers
        self.weights = [module.weight for module in layers.modules() if isinstance(module, nn.Linear)]
        self.device = self.weights[0].device
        self.generator = torch.Generator().manual_seed(seed)
        self.momenta = [torch.zeros_like(weight) for weight in self.weights]
        self.curvatures = [_Curvature(weight) for weight in self.weights]

    def run(self) -> list[Pass]:
        """Run passes until one helps too little, too many fail, or all are done."""
        passes: list[Pass] = []
        best = _divergence(self.held_out, self.pruned)
        length, failures = _CAUTION * self._best_length(self._measure()), 0
        if length <= 0:
            logger.warning(_NOTHING)
            return passes
        logger.info("divergence %.5f nats per token on held-out windows, first length %.3g", best, length)
        with Progress("natural gradient", "step", _PASSES * len(self.fitted)) as progress:
            for number in range(_PASSES):
                start = [weight.detach().to(CPU, copy=True) for weight in self.weights]
                self._pass(number, length, progress)
                after = _divergence(self.held_out, self.pruned)
                helped = after < best
                passes.append(Pass(length, best, after, helped))
                outcome = "kept" if helped else "undone"
                logger.info("pass %d, length %.3g: divergence %.5f -> %.5f, %s", number + 1, length, best, after, outcome)
                enough = helped and best - after < _GAIN * best
                if helped:
                    best = after
                else:
                    for weight, before, momentum in zip(self.weights, start, self.momenta, strict=True):
                        weight.data.copy_(before)
                        momentum.zero_()
                    length, failures = length * _SHORTER, failures + 1
                if enough or failures > _RETRIES:
                    break
        if not any(each.kept for each in passes):
            logger.warning(_NOTHING)
        return passes

    def _pass(self, number: int, length: float, progress: Progress) -> None:
        """Take one step on every batch of fitted windows, in random order."""
        total = _PASSES * len(self.fitted)
        for step, index in enumerate(torch.randperm(len(self.fitted), generator=self.generator).tolist()):
            self._step(index, length * (1 - (number * len(self.fitted) + step) / total))
            progress.update()

    def _step(self, index: int, length: float) -> None:
        gradients = self._gradients(self.fitted, [index])
        for weight, momentum, curvature, gradient in zip(
            self.weights, self.momenta, self.curvatures, gradients, strict=True
        ):
            momentum.lerp_(gradient, 1 - _MOMENTUM)
            weight.data.sub_(curvature.direction(momentum), alpha=length)

    def _measure(self) -> list[torch.Tensor]:
        """Measure the curvature on some of the fitted windows and return the natural gradient on them."""
        some = torch.randperm(len(self.fitted), generator=self.generator)[:_MEASURED].tolist()
        for index in some:
            drawn = self._backward(self.fitted, index, drawn=True)
            for curvature, gradient in zip(self.curvatures, drawn, strict=True):
                curvature.add(gradient)
        for curvature in self.curvatures:
            curvature.invert(sum(self.fitted.sizes[index] for index in some))
        gradients = self._gradients(self.fitted, some)
        return [curvature.direction(g) for curvature, g in zip(self.curvatures, gradients, strict=True)]

    def _best_length(self, directions: list[torch.Tensor]) -> float:
        """Return the minimum of the quadratic model of the held-out divergence; 0 if no length lowers it."""
        slopes = self._gradients(self.held_out, range(len(self.held_out)))
        descent = sum(float((d * p).sum(dtype=torch.float64)) for d, p in zip(slopes, directions, strict=True))
        return descent / self._quadratic_form(directions) if descent > 0 else 0.0

    def _gradients(self, predictions: Predictions, batches: Iterable[int]) -> list[torch.Tensor]:
        """Return the gradients of the divergence, in nats per token, on some batches."""
        batches = list(batches)
        tokens = sum(predictions.sizes[index] for index in batches)
        totals = [torch.zeros_like(weight) for weight in self.weights]
        for index in batches:
            for total, gradient in zip(totals, self._backward(predictions, index), strict=True):
                total.add_(gradient, alpha=1 / tokens)
        return totals

    def _backward(self, predictions: Predictions, index: int, *, drawn: bool = False) -> list[torch.Tensor]:
        """Return the gradients of the divergence, or with `drawn` of the loss on drawn next tokens, summed over a batch."""
        for weight in self.weights:
            weight.requires_grad_(True)
        ids, reference = predictions[index]
        if len(ids):
            log_probs = _log_probs(self.pruned, ids, fast=True)
            if drawn:
                seed = self.seed + index * distributed.count() + distributed.index()
                generator = torch.Generator(reference.device).manual_seed(seed)
                following = torch.multinomial(reference.exp().flatten(0, 1), 1, generator=generator)
                loss = -log_probs.flatten(0, 1).gather(1, following).sum()
            else:
                # the entropy of the dense model has no gradient
                loss = -(reference.exp() * log_probs).sum()
            loss.backward()
        gradients = []
        for weight in self.weights:
            gradients.append(torch.zeros_like(weight) if weight.grad is None else weight.grad)
            weight.grad = None
            weight.requires_grad_(False)
        distributed.all_reduce_(gradients)
        return gradients

    @torch.no_grad()
    def _quadratic_form(self, directions: list[torch.Tensor]) -> float:
        """Compute P^T F P per token, with F the Fisher of the pruned model on the first held-out batch."""
        ids = next(ids for ids in self.held_out.batches if len(ids)).to(self.device)
        start = [weight.detach().clone() for weight in self.weights]
        here = _log_probs(self.pruned, ids)
        near = 1e-5
        for _ in range(_TRIES):
            for weight, before, direction in zip(self.weights, start, directions, strict=True):
                weight.data.copy_(before - near * direction)
            moved = float(kl_divergence(here, _log_probs(self.pruned, ids)).sum(dtype=torch.float64)) / ids.numel()
            if _NEAR / 4 < moved < _NEAR * 4:
                break
            # the divergence grows with the square of the distance
            near *= min(100.0, max(0.01, (_NEAR / max(moved, 1e-12)) ** 0.5)) if moved == moved else 0.01
        for weight, before in zip(self.weights, start, strict=True):
            weight.data.copy_(before)
        return 2 * moved / near**2


def _log_probs(pruned: Any, ids: torch.Tensor, *, fast: bool = False) -> torch.Tensor:
    """Return float32 log-probabilities `(windows, seq_len, vocabulary)`; `fast` multiplies in bfloat16 on a GPU."""
    with torch.autocast("cuda", torch.bfloat16, enabled=fast and ids.is_cuda):
        logits: torch.Tensor = pruned(input_ids=ids, use_cache=False).logits
    return logits.to(ids.device).float().log_softmax(-1)


@torch.no_grad()
def _divergence(held_out: Predictions, pruned: Any) -> float:
    """Return KL(dense || pruned) in nats per token over the windows of all processes."""
    total = 0.0
    for ids, reference in held_out:
        total += float(kl_divergence(reference, _log_probs(pruned, ids)).sum(dtype=torch.float64))
    return distributed.all_reduce_scalar(total, pruned.get_input_embeddings().weight) / sum(held_out.sizes)
