"""Move a pruned model a few natural-gradient steps towards the predictions of the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..data import Calibration, split_batches
from ..errors import WorkError
from ..linalg import add_gram_, exact_products, ridge_term
from ..models import BLOCK_MODULES, OUTPUT_PROJECTION, eval_without_grad
from ..statistics import RIDGE
from ..utils import CPU, distributed, track

#: maximum number of steps; each costs about as much as the calibration pass
_STEPS = 5
#: first step length tried; doubled as long as the held-out divergence decreases
_FIRST_STEP = 0.005
_TRIES = 8


def natural_gradient_steps(model: Any, pruned: Any, calibration: Calibration) -> list[float]:
    """Move every `o_proj` and `down_proj` of `pruned`, in place, a few steps down KL(dense || pruned).

    A step is W <- W - s (G + rI)^-1 D (H + rI)^-1 with D the mean gradient of the divergence, H the second moment of
    the projection's inputs, G that of the gradient at its outputs when the next token is drawn from the dense model
    (the Kronecker-factored Fisher of Martens & Grosse 2015, arXiv:1503.05671, eq. 1 and 27), and r the ridge of the
    optimal-brain-surgeon solve. H and G are measured once, D anew at every step. s is found by doubling (halving where
    the previous step length is too long) on held-out windows; a step that does not lower their divergence is undone.

    Args:
        model: the dense causal LM; unchanged.
        pruned: the pruned causal LM; its weights change, its dtype and device do not.
        calibration: directions are computed on `fitted`, step lengths on `held_out`. Without held-out windows (fewer
            than 8 windows in all) no step is taken.

    Returns:
        The lengths of the steps taken.

    Raises:
        WorkError: a divergence that is not finite.
    """
    if not len(calibration.held_out):
        return []
    held_out = Predictions.of(model, calibration.held_out)
    best = _divergence(held_out, pruned)
    hooks = output_hooks(pruned)
    if not best or not hooks:
        return []  # equal predictions, or no output projection
    fitted = Predictions.of(model, calibration.fitted)
    lengths: list[float] = []
    for _ in range(_STEPS):
        _measure(fitted, pruned, calibration.seed, hooks)
        step = _Step(hooks)

        def divergence(length: float, step: _Step = step) -> float:
            step.take(length)
            return _divergence(held_out, pruned)

        best, length = _line_search(divergence, best, lengths[-1] if lengths else _FIRST_STEP)
        step.take(length)
        if not length:
            break
        lengths.append(length)
    return lengths


def _line_search(divergence: Callable[[float], float], best: float, first: float) -> tuple[float, float]:
    """Return the lowest divergence and its step length, doubling from `first` or halving if `first` is too long."""
    length, tried, factor = 0.0, first, 2.0
    for trial in range(_TRIES):
        found = divergence(tried)
        if found < best:
            best, length = found, tried
        elif trial == 0:
            factor = 0.5
        else:
            break
        if length and factor < 1:
            break
        tried *= factor
        if tried < _FIRST_STEP:
            break
    return best, length


@dataclass(frozen=True)
class Predictions:
    """Predictions of the dense model for the windows of this process; may be iterated over repeatedly.

    The last hidden states are kept, `tokens x hidden_size` values on the CPU; each iteration applies the head again.

    Attributes:
        batches: int64 `(windows, seq_len)` each.
        hidden: `(windows, seq_len, hidden_size)` each.
        head: maps hidden states to logits.
        tokens: number of tokens over all processes.
    """

    batches: list[torch.Tensor]
    hidden: list[torch.Tensor]
    head: nn.Linear
    tokens: int

    @staticmethod
    @torch.no_grad()
    def of(model: Any, windows: torch.Tensor) -> Predictions:
        """Run the dense model once on `windows`, int64 `(samples, seq_len)`."""
        batches = list(split_batches(distributed.shard(windows), model.config.vocab_size))
        device = model.get_input_embeddings().weight.device
        decoder = model.get_decoder()
        hidden = [decoder(input_ids=ids.to(device), use_cache=False).last_hidden_state.cpu() for ids in batches]
        return Predictions(batches, hidden, model.get_output_embeddings(), windows.numel())

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield token ids and float32 log probabilities `(windows, seq_len, vocabulary)` of each batch."""
        device = self.head.weight.device
        for ids, hidden in zip(self.batches, self.hidden, strict=True):
            with torch.no_grad():
                log_probs = self.head(hidden.to(device)).float().log_softmax(-1)
            yield ids.to(device), log_probs


class _Step:
    """Weights before a step, and the direction of the step."""

    def __init__(self, hooks: list[_OutputHooks]) -> None:
        self.moves = [(hook.linear.weight, hook.linear.weight.detach().clone(), hook.direction()) for hook in hooks]

    def take(self, length: float) -> None:
        for weight, start, direction in self.moves:
            weight.data.copy_(start.double() - length * direction.to(start.device) if length else start)


class _OutputHooks:
    """Sum x x^T, sampled g g^T and divergence gradients g x^T at one output projection.

    Attributes:
        curved: whether the first pass has measured the second moments.
    """

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        device = linear.weight.device
        self.inputs = torch.zeros(linear.in_features, linear.in_features, device=device)
        self.outputs = torch.zeros(linear.out_features, linear.out_features, device=device)
        self.slope = torch.zeros(linear.out_features, linear.in_features, device=device)
        self.tokens = 0
        self.drawn = self.curved = False
        self._factors: tuple[torch.Tensor, torch.Tensor] | None = None
        self._x = torch.empty(0)

    def begin(self) -> None:
        """Reset the gradient before a pass."""
        self.slope.zero_()
        self.tokens = 0

    def attach(self, stack: ExitStack) -> None:
        stack.callback(self.linear.register_forward_hook(self._forward).remove)

    def direction(self) -> torch.Tensor:
        """Return (G + rI)^-1 D (H + rI)^-1, float64 `(out_features, in_features)` on the CPU."""
        outputs, inputs = self._factors or (_factor(self.outputs, self.tokens), _factor(self.inputs, self.tokens))
        # on a GPU factoring again is cheaper than storing the factors of all layers in host memory
        if self.slope.device == CPU and not self.curved:
            self._factors = outputs, inputs
            self.outputs = self.inputs = torch.empty(0)
        self.curved = True
        left = torch.cholesky_solve(self.slope.double() / self.tokens, outputs)
        return torch.cholesky_solve(left.T, inputs).T.cpu()

    def add_up(self) -> None:
        """Sum the results of the last pass over processes."""
        distributed.all_reduce_((self.slope,) if self.curved else (self.slope, self.inputs, self.outputs))
        self.tokens = int(distributed.all_reduce_scalar(self.tokens, self.slope))

    def _forward(self, _module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self._x = args[0].detach().flatten(0, -2)  # (tokens, n)
        if not self.curved:
            add_gram_(self.inputs, self._x)
        self.tokens += len(self._x)
        output.register_hook(self._backward)

    def _backward(self, gradient: torch.Tensor) -> None:
        g = gradient.flatten(0, -2)  # (tokens, d)
        if self.drawn:
            add_gram_(self.outputs, g)
        else:
            with exact_products(g.dtype, self._x.dtype):
                self.slope.addmm_(g.float().T, self._x.float())


def output_hooks(pruned: Any) -> list[_OutputHooks]:
    """Create the hooks of every output projection, in layer order."""
    return [
        _OutputHooks(layer.get_submodule(name))
        for layer in pruned.get_decoder().layers
        for kind, name in OUTPUT_PROJECTION.items()
        if getattr(layer, BLOCK_MODULES[kind][0]) is not None
    ]


def _measure(fitted: Predictions, pruned: Any, seed: int, hooks: list[_OutputHooks]) -> None:
    """Run the pruned model over the fitted windows, with one backward pass per batch (two in the first call)."""
    device = fitted.head.weight.device
    generator = torch.Generator(device).manual_seed(seed + distributed.index())
    with ExitStack() as stack:
        stack.enter_context(eval_without_grad(pruned))
        for hook in hooks:
            hook.begin()
            hook.attach(stack)
        bar = track(fitted, "natural gradient", "batch", len(fitted.batches))
        for ids, log_probs in bar:
            wanted = log_probs.exp()
            embeds = pruned.get_input_embeddings()(ids).detach().requires_grad_(True)
            given = pruned(inputs_embeds=embeds, use_cache=False).logits.to(device).float().log_softmax(-1)
            for hook in hooks:
                hook.drawn = False
            # the entropy of the dense model has no gradient
            torch.autograd.backward(-(wanted * given).sum(), retain_graph=not hooks[0].curved)
            if hooks[0].curved:
                continue
            drawn = torch.multinomial(wanted.flatten(0, 1), 1, generator=generator)
            for hook in hooks:
                hook.drawn = True
            torch.autograd.backward(-given.flatten(0, 1).gather(1, drawn).sum())
    for hook in hooks:
        hook.add_up()


@torch.no_grad()
def _divergence(held_out: Predictions, pruned: Any) -> float:
    """Return KL(dense || pruned) in nats per token over the windows of all processes."""
    total = 0.0
    for ids, wanted in held_out:
        given = pruned(input_ids=ids, use_cache=False).logits.to(wanted.device).float().log_softmax(-1)
        total += float((wanted.exp() * (wanted - given)).sum(dtype=torch.float64))
    total = distributed.all_reduce_scalar(total, pruned.get_input_embeddings().weight)
    if total != total:
        raise WorkError("the divergence of the pruned from the dense model is nan: load the model in float32 or bfloat16")
    return total / held_out.tokens


def _factor(total: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return the Cholesky factor of the mean plus its ridge, float64; only the lower triangle of `total` is read."""
    mean = total.double() / tokens
    mean.diagonal().add_(ridge_term(mean, RIDGE))
    factor: torch.Tensor = torch.linalg.cholesky(mean)
    return factor
