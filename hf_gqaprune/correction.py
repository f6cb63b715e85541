"""A dense and a pruned model and calibration windows go in; the pruned model, one natural-gradient step closer, comes out.

Layer-wise re-fitting matches activations. This step looks at what they are for: the dense model's predictions.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from .calibration import Calibration, split_batches
from .errors import WorkError
from .statistics import RIDGE, frozen
from .torch_pruning import OUTPUT_PROJECTION

#: first step length that is tried, doubled as long as the held-out divergence falls
_FIRST_STEP = 0.005
_DOUBLINGS = 8


def natural_gradient_step(model: Any, pruned: Any, calibration: Calibration) -> float:
    """Move every `o_proj` and `down_proj` of `pruned`, in place, one step down KL(dense || pruned).

    The step is W <- W - s (G + rI)^-1 D (H + rI)^-1 with D the mean gradient of the divergence, H the second moment of
    the projection's inputs, G that of the gradient at its outputs when the next token is drawn from the dense model
    (the Kronecker-factored Fisher of Martens & Grosse 2015, arXiv:1503.05671, eq. 1 and 27), and r the ridge of the
    optimal-brain-surgeon solve. s is found by doubling, on held-out windows: nothing changes where no step helps.

    Args:
        model: the dense causal LM; unchanged.
        pruned: the pruned causal LM; its weights change, dtype and device stay.
        calibration: directions come from `fitted`, the step length from `held_out`. Without held-out windows (fewer
            than 8 in all) there is nothing to measure a step by, and nothing is done.

    Returns:
        The step length taken, 0.0 for none.

    Raises:
        WorkError: a divergence that is not finite.
    """
    if not len(calibration.held_out):
        return 0.0
    best, length = _divergence(model, pruned, calibration.held_out), 0.0
    if not best:
        return 0.0
    taps = _measure(model, pruned, calibration)
    steps = [(tap.linear.weight, tap.linear.weight.detach().clone(), tap.direction()) for tap in taps]

    def take(length: float) -> None:
        for weight, start, direction in steps:
            weight.data.copy_(start.double().cpu() - length * direction if length else start)

    for doubling in range(_DOUBLINGS):
        tried = _FIRST_STEP * 2**doubling
        take(tried)
        found = _divergence(model, pruned, calibration.held_out)
        if not found < best:
            break
        best, length = found, tried
    take(length)
    return length


class _Tap:
    """Sums at one output projection: inputs x x^T, drawn gradients g g^T, and gradients of the divergence g x^T."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        device = linear.weight.device
        self.inputs = torch.zeros(linear.in_features, linear.in_features, device=device)
        self.outputs = torch.zeros(linear.out_features, linear.out_features, device=device)
        self.slope = torch.zeros(linear.out_features, linear.in_features, device=device)
        self.tokens = 0
        self.drawn = False
        self._x = torch.empty(0)

    def attach(self, stack: ExitStack) -> None:
        stack.callback(self.linear.register_forward_hook(self._forward).remove)

    def direction(self) -> torch.Tensor:
        """(G + rI)^-1 D (H + rI)^-1, float64 `(out_features, in_features)` on the CPU."""
        left = torch.cholesky_solve(self.slope.double().cpu() / self.tokens, _factor(self.outputs, self.tokens))
        return torch.cholesky_solve(left.T, _factor(self.inputs, self.tokens)).T

    def _forward(self, _module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self._x = args[0].detach().flatten(0, -2).float()  # (tokens, n)
        self.inputs.addmm_(self._x.T, self._x)
        self.tokens += len(self._x)
        output.register_hook(self._backward)

    def _backward(self, gradient: torch.Tensor) -> None:
        g = gradient.flatten(0, -2).float()  # (tokens, d)
        if self.drawn:
            self.outputs.addmm_(g.T, g)
        else:
            self.slope.addmm_(g.T, self._x)


def _measure(model: Any, pruned: Any, calibration: Calibration) -> list[_Tap]:
    """One pass of both models over the fitted windows, with two backward passes of the pruned one."""
    from tqdm.auto import tqdm

    blocks = {"attention": "self_attn", "mlp": "mlp"}
    taps = [
        _Tap(getattr(layer, blocks[kind]).get_submodule(name.rpartition(".")[2]))
        for layer in pruned.get_decoder().layers
        for kind, name in OUTPUT_PROJECTION.items()
        if getattr(layer, blocks[kind]) is not None
    ]
    generator = torch.Generator().manual_seed(calibration.seed)
    device = pruned.get_input_embeddings().weight.device
    batches = list(split_batches(calibration.fitted))
    with ExitStack() as stack:
        stack.enter_context(frozen(pruned))
        for tap in taps:
            tap.attach(stack)
        for ids in tqdm(batches, desc="correcting", unit="batch", disable=None, leave=False):
            ids = ids.to(device)
            wanted = _log_probs(model, ids).exp()
            embeds = pruned.get_input_embeddings()(ids).detach().requires_grad_(True)
            given = pruned(inputs_embeds=embeds, use_cache=False).logits.float().log_softmax(-1)
            for tap in taps:
                tap.drawn = False
            # the entropy of the dense model has no gradient
            torch.autograd.backward(-(wanted * given).sum(), retain_graph=True)
            drawn = torch.multinomial(wanted.flatten(0, 1).cpu(), 1, generator=generator).to(device)
            for tap in taps:
                tap.drawn = True
            torch.autograd.backward(-given.flatten(0, 1).gather(1, drawn).sum())
    return taps


@torch.no_grad()
def _divergence(model: Any, pruned: Any, windows: torch.Tensor) -> float:
    """KL(dense || pruned) in nats per token."""
    device = pruned.get_input_embeddings().weight.device
    total = 0.0
    for ids in split_batches(windows):
        wanted, given = _log_probs(model, ids.to(device)), _log_probs(pruned, ids.to(device))
        total += float((wanted.exp() * (wanted - given)).sum(dtype=torch.float64))
    if total != total:
        raise WorkError("the divergence of the pruned model from the dense one is not a number: activations overflow")
    return total / windows.numel()


@torch.no_grad()
def _log_probs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """float32 `(windows, seq_len, vocabulary)`."""
    return model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)


def _factor(total: torch.Tensor, tokens: int) -> torch.Tensor:
    """Cholesky factor of the mean with its ridge, float64."""
    mean = total.double().cpu() / tokens
    scale = float(mean.diagonal().mean())
    mean.diagonal().add_(RIDGE * scale if scale > 0 else 1.0)
    return torch.linalg.cholesky(mean)
