"""Measure every block of a model while calibration windows run through it."""

from __future__ import annotations

import functools
import logging
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..data import Calibration, split_batches
from ..dependency_graph import UnitSlices, trace_units
from ..errors import UsageError, WorkError, unknown
from ..linalg import add_gram_, mirror_
from ..models import (
    KINDS,
    OUTPUT_PROJECTION,
    ModelShape,
    check_loaded,
    check_materialized,
    check_outer_weights,
    check_weights,
    eval_without_grad,
    loss_gradient,
    requiring_grad,
)
from ..utils import CPU, distributed, track
from .criteria import CRITERIA, Block, Criterion
from .moments import Moments
from .store import BlockStatistics, Statistics, weight_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
#: minimum number of calibration tokens per FFN channel before a warning
_TOKENS_PER_CHANNEL = 4
#: smallest divisor of a weighted sum: where no gradient arrives nothing was summed either
_TINY = torch.finfo(torch.float32).tiny


def collect_statistics(
    model: PreTrainedModel,
    calibration: Calibration | None = None,
    *,
    criterion: str = "curvature",
    moments: bool = True,
    seed: int = 0,
) -> Statistics:
    """Measure every block of `model` on `calibration` in one pass and turn it into removal curves.

    Under `accelerate launch` every process measures a shard of the windows and all return the same statistics. The
    model is neither copied nor changed: `requires_grad` flags and training mode are restored.

    Args:
        model: a Llama or pruned Llama causal LM, any float dtype; moments are kept in float32.
        calibration: the windows; may be None if `moments` is false and the criterion needs no calibration.
        criterion: a key of `CRITERIA`.
        moments: keep the second moments of the output projections' inputs, which least squares needs.
        seed: for the criterion `random`.

    Raises:
        UsageError: unknown criterion, unsupported architecture, or missing calibration or one of another vocabulary.
        WorkError: a weight, activation or gradient is not finite.
    """
    if criterion not in CRITERIA:
        raise unknown("criterion", criterion, CRITERIA)
    rule = CRITERIA[criterion]
    check_loaded(model)
    source = ModelShape.from_config(model.config)
    if calibration is None and rule.calibrated:
        raise UsageError(f"criterion {criterion} needs calibration text: pass --calibration NAME_OR_FILE")
    slices = trace_units(source.layers)
    layers: Any = model.get_decoder().layers
    check_weights(dict(enumerate(layers)))
    check_outer_weights(model)
    hooks: dict[tuple[int, str], MomentHooks] = {}
    with ExitStack() as stack:
        stack.enter_context(eval_without_grad(model))
        for index, shape in enumerate(source.layers):
            for kind in KINDS:
                if kind not in shape.skip:
                    hooks[index, kind] = MomentHooks(index, kind, layers[index], slices[index])
        if calibration is not None and (rule.calibrated or moments):
            check_tokens(calibration, source)
            check_materialized(model)
            for block in hooks.values():
                block.attach(stack, rule.moments or moments, rule.output_gradients, rule.weight_gradients)
            backward = rule.output_gradients or rule.weight_gradients
            _run(model, calibration, backward)
            for block in hooks.values():
                block.all_reduce()
    blocks = {}
    for key, block in track(hooks.items(), "removal curves", "block"):
        result = block.statistics(rule, seed)
        kept = result.moments if moments else None
        blocks[key] = replace(result, stored=kept and kept.to(CPU), weight=weight_digest(block.weight))
        block.release()
    return Statistics(source, criterion, blocks, calibration, seed)


def check_tokens(calibration: Calibration, source: ModelShape) -> None:
    """Warn if there are too few tokens for a stable second moment.

    Raises:
        UsageError: a token is outside the model's vocabulary.
    """
    low, high = (int(end) for end in calibration.ids.aminmax())
    if low < 0 or high >= source.vocab_size:
        raise UsageError(
            f"calibration token {low if low < 0 else high} is outside the model's vocabulary of {source.vocab_size}: "
            "calibrate with the model's own tokenizer"
        )
    tokens, wanted = calibration.ids.numel(), _TOKENS_PER_CHANNEL * max(shape.ffn for shape in source.layers)
    if tokens < wanted:
        logger.warning(
            "%d calibration tokens are few for an FFN of %d channels: take at least %d (more samples or longer windows)",
            tokens, wanted // _TOKENS_PER_CHANNEL, wanted,
        )  # fmt: skip


class MomentHooks:
    """Accumulate second moments and gradients of one block while calibration batches run through it.

    With output gradients g, each token's x x^T is weighted by |g|^2. Together with the sum of g g^T this is the first step
    of the power iteration towards the Kronecker product nearest to the Fisher E[x x^T (x) g g^T] (Van Loan & Pitsianis
    1993), started at the identity; its trace E[|x|^2 |g|^2] is exact. A token with massive activations and no gradient,
    such as the first position of most models, has no weight.
    """

    def __init__(self, layer: int, kind: str, module: nn.Module, slices: UnitSlices) -> None:
        self.layer, self.kind = layer, kind
        self.units = slices.units(kind)
        self.linears: dict[str, nn.Linear] = {name: module.get_submodule(name) for name in self.units}  # type: ignore[misc]
        self.tokens = 0
        self.inputs: torch.Tensor | None = None
        self.input_sum: torch.Tensor | None = None
        self.weight_sum: torch.Tensor | None = None
        self.gradients: torch.Tensor | None = None
        self.weight_gradients: dict[str, torch.Tensor] = {}
        self._passing: Any = None

    @property
    def weight(self) -> torch.Tensor:
        """Return the weight of the output projection."""
        return self.linears[OUTPUT_PROJECTION[self.kind]].weight

    def attach(self, stack: ExitStack, moments: bool, output_gradients: bool, weight_gradients: bool) -> None:
        """Register the hooks that accumulate the requested sums until `stack` is closed."""
        output = self.linears[OUTPUT_PROJECTION[self.kind]]
        rows, columns = output.weight.shape
        zeros = functools.partial(torch.zeros, device=output.weight.device)
        if moments:
            self.inputs, self.input_sum = zeros(columns, columns), zeros(columns)
            stack.callback(output.register_forward_pre_hook(self._add_input).remove)
        if output_gradients:
            self.gradients, self.weight_sum = zeros(rows, rows), zeros(())
            stack.callback(output.register_forward_hook(self._hook_output).remove)
        if weight_gradients:
            for name, linear in self.linears.items():
                stack.enter_context(requiring_grad(linear.weight))
                self.weight_gradients[name] = torch.zeros_like(linear.weight, dtype=torch.float32)
                hook = linear.weight.register_post_accumulate_grad_hook(self._weight_gradient_hook(name))
                stack.callback(hook.remove)

    def all_reduce(self) -> None:
        """Sum over processes."""
        sums = [self.inputs, self.input_sum, self.weight_sum, self.gradients, *self.weight_gradients.values()]
        distributed.all_reduce_(tensor for tensor in sums if tensor is not None)
        self.tokens = int(distributed.all_reduce_scalar(self.tokens, next(iter(self.linears.values())).weight))

    def block(self, seed: int) -> Block:
        """Return the input of a criterion, turning the sums into means in place."""
        moments = None
        if self.inputs is not None and self.input_sum is not None:
            gradients, weight = self.gradients, self.weight_sum
            moments = Moments(
                self.tokens,
                mirror_(self.inputs.div_(self.tokens if weight is None else weight.clamp(min=_TINY))),
                self.input_sum / self.tokens,
                None if gradients is None else mirror_(gradients.div_(self.tokens)),
            )
            self.inputs = self.gradients = None
            _check_moments(self.layer, self.kind, moments)
        weights = {name: linear.weight.detach() for name, linear in self.linears.items()}
        return Block(self.layer, self.kind, weights, self.units, moments, self.weight_gradients, seed)

    def statistics(self, rule: Criterion, seed: int) -> BlockStatistics:
        """Return the block's removal curve, and its moments if they were accumulated; `weight` is left unset."""
        block = self.block(seed)
        try:
            curve = rule.curve(block)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise WorkError(f"layer {self.layer} {self.kind}: second moments are not positive definite: {error}") from error
        if not bool(torch.isfinite(curve.cost).all()):
            raise WorkError(f"layer {self.layer} {self.kind}: the criterion returned costs that are not finite")
        return BlockStatistics(self.layer, self.kind, curve, block.moments)

    def release(self) -> None:
        """Free the accumulated sums."""
        self.inputs = self.gradients = None
        self.weight_gradients = {}

    def _add_input(self, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0].detach().flatten(0, -2)  # (tokens, n)
        if self.weight_sum is None:
            add_gram_(self.inputs, x)  # type: ignore[arg-type]
        else:
            self._passing = x
        self.input_sum += x.sum(0, dtype=torch.float32)  # type: ignore[operator]
        self.tokens += len(x)

    def _hook_output(self, _module: nn.Module, _args: Any, output: torch.Tensor) -> None:
        output.register_hook(self._add_gradient)

    def _add_gradient(self, gradient: torch.Tensor) -> None:
        g = gradient.flatten(0, -2)  # (tokens, d)
        add_gram_(self.gradients, g)  # type: ignore[arg-type]
        if self.inputs is None:
            return
        x, self._passing = self._passing, None
        weight = g.float().square().sum(1, keepdim=True)
        self.weight_sum += weight.sum()  # type: ignore[operator]
        # bfloat16 for both halves: the weights exceed the range of float16
        add_gram_(self.inputs, (x * weight.sqrt()).to(torch.float32 if x.dtype == torch.float32 else torch.bfloat16))

    def _weight_gradient_hook(self, name: str) -> Any:
        def add(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:
                self.weight_gradients[name] += parameter.grad.float()
                parameter.grad = None

        return add


def _run(model: PreTrainedModel, calibration: Calibration, backward: bool) -> None:
    """Run every batch forward and, with `backward`, back-propagate the summed next-token loss."""
    device = next(model.parameters()).device
    batches = list(split_batches(distributed.shard(calibration.ids), model.config.vocab_size))
    with torch.set_grad_enabled(backward):
        for batch in track(batches, "calibration", "batch"):
            ids = batch.to(device)
            # gradients end at the embeddings' output, so that no weight needs one
            embeds = model.get_input_embeddings()(ids).detach().requires_grad_(backward)
            hidden = model.get_decoder()(inputs_embeds=embeds, use_cache=False).last_hidden_state
            if not backward:
                continue
            try:
                gradient = loss_gradient(hidden, model.get_output_embeddings(), ids, model.config.vocab_size)
            except WorkError as error:
                raise WorkError(f"{error}, first in {_first_overflow(model, embeds)}") from error
            hidden.backward(gradient)


def _first_overflow(model: PreTrainedModel, embeds: torch.Tensor) -> str:
    """Name the first block whose output for the embeddings `embeds` is not finite, or the head if all are finite."""
    overflows: list[str] = []

    def check(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if not bool(torch.isfinite(hidden).all()):
                overflows.append(name)

        return hook

    layers: Any = model.get_decoder().layers
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            for kind, block in (("attention", layer.self_attn), ("mlp", layer.mlp)):
                if block is not None:
                    stack.callback(block.register_forward_hook(check(f"layer {index} {kind}")).remove)
        model(inputs_embeds=embeds, use_cache=False)
    return overflows[0] if overflows else "the head"


def _check_moments(layer: int, kind: str, moments: Moments) -> None:
    for name, value in (("inputs", moments.inputs), ("output gradients", moments.gradients)):
        if value is not None and not bool(torch.isfinite(value).all()):
            raise WorkError(f"layer {layer} {kind}: {name} of {OUTPUT_PROJECTION[kind]} are not finite")
