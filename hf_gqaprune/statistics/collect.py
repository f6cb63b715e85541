"""A model and calibration windows go in; what every block shows of itself while they pass through comes out."""

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
    check_held,
    check_outer_weights,
    check_weights,
    frozen,
    loss_gradient,
    trainable,
)
from ..utils import CPU, distributed
from .criteria import CRITERIA, Block, Criterion
from .moments import Moments
from .store import BlockStatistics, Statistics, weight_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
#: fewer calibration tokens than this per FFN channel are warned of
_TOKENS_PER_CHANNEL = 4


def collect_statistics(
    model: PreTrainedModel,
    calibration: Calibration | None = None,
    *,
    criterion: str = "curvature",
    moments: bool = True,
    seed: int = 0,
) -> Statistics:
    """Measure every block of `model` on `calibration` in one pass and turn it into removal curves.

    Under `accelerate launch` every process measures its share of the windows and all get the same statistics.

    The model is left as it was: no copy is made, no weight changes, `requires_grad` flags and mode are restored.

    Args:
        model: a Llama or pruned Llama causal LM, any float dtype; moments are kept in float32.
        calibration: the windows; may be None for criteria that need none when `moments` is false.
        criterion: a key of `importance.CRITERIA`.
        moments: also keep the second moments of the output projections' inputs, which re-fitting needs.
        seed: for the criterion `random`.

    Raises:
        UsageError: unknown criterion, a model of another architecture, calibration missing or of another vocabulary.
        WorkError: a weight, activation or gradient that is not finite, named.
    """
    if criterion not in CRITERIA:
        raise unknown("criterion", criterion, CRITERIA)
    rule = CRITERIA[criterion]
    source = ModelShape.from_config(model.config)
    if calibration is None and rule.calibrated:
        raise UsageError(f"criterion {criterion} needs calibration text: pass --calibration NAME_OR_FILE")
    slices = trace_units(source.layers)
    layers: Any = model.get_decoder().layers
    check_weights(dict(enumerate(layers)))
    check_outer_weights(model)
    taps: dict[tuple[int, str], Tap] = {}
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        for index, shape in enumerate(source.layers):
            for kind in KINDS:
                if kind not in shape.skip:
                    taps[index, kind] = Tap(index, kind, layers[index], slices[index])
        if calibration is not None and (rule.calibrated or moments):
            check_tokens(calibration, source)
            check_held(model)
            for tap in taps.values():
                tap.attach(stack, rule.moments or moments, rule.output_gradients, rule.weight_gradients)
            backward = rule.output_gradients or rule.weight_gradients
            _run(model, calibration, backward)
            for tap in taps.values():
                tap.add_up()
    blocks = {}
    for key, tap in taps.items():
        found = tap.statistics(rule, seed)
        kept = found.moments if moments else None
        blocks[key] = replace(found, stored=kept and kept.to(CPU), weight=weight_digest(tap.weight))
        tap.release()
    return Statistics(source, criterion, blocks, calibration, seed)


def check_tokens(calibration: Calibration, source: ModelShape) -> None:
    """Say so where the tokens are too few for what is estimated from them.

    Raises:
        UsageError: a token that the model does not have.
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


class Tap:
    """Sums what one block shows while calibration batches pass through it."""

    def __init__(self, layer: int, kind: str, module: nn.Module, slices: UnitSlices) -> None:
        self.layer, self.kind = layer, kind
        self.units = slices.units(kind)
        self.linears: dict[str, nn.Linear] = {name: module.get_submodule(name) for name in self.units}  # type: ignore[misc]
        self.tokens = 0
        self.inputs: torch.Tensor | None = None
        self.input_sum: torch.Tensor | None = None
        self.gradients: torch.Tensor | None = None
        self.weight_gradients: dict[str, torch.Tensor] = {}

    @property
    def weight(self) -> torch.Tensor:
        """Of the output projection."""
        return self.linears[OUTPUT_PROJECTION[self.kind]].weight

    def attach(self, stack: ExitStack, moments: bool, output_gradients: bool, weight_gradients: bool) -> None:
        output = self.linears[OUTPUT_PROJECTION[self.kind]]
        rows, columns = output.weight.shape
        zeros = functools.partial(torch.zeros, device=output.weight.device)
        if moments:
            self.inputs, self.input_sum = zeros(columns, columns), zeros(columns)
            stack.callback(output.register_forward_pre_hook(self._take_input).remove)
        if output_gradients:
            self.gradients = zeros(rows, rows)
            stack.callback(output.register_forward_hook(self._watch_output).remove)
        if weight_gradients:
            for name, linear in self.linears.items():
                stack.enter_context(trainable(linear.weight))
                self.weight_gradients[name] = torch.zeros_like(linear.weight, dtype=torch.float32)
                hook = linear.weight.register_post_accumulate_grad_hook(self._take_weight_gradient(name))
                stack.callback(hook.remove)

    def add_up(self) -> None:
        """Sum over processes."""
        sums = [self.inputs, self.input_sum, self.gradients, *self.weight_gradients.values()]
        distributed.add_up(tensor for tensor in sums if tensor is not None)
        self.tokens = int(distributed.added_up(self.tokens, next(iter(self.linears.values())).weight))

    def block(self, seed: int) -> Block:
        """What the criterion sees; the sums become means, in their own memory."""
        moments = None
        if self.inputs is not None and self.input_sum is not None:
            gradients = self.gradients
            moments = Moments(
                self.tokens,
                mirror_(self.inputs.div_(self.tokens)),
                self.input_sum / self.tokens,
                None if gradients is None else mirror_(gradients.div_(self.tokens)),
            )
            self.inputs = self.gradients = None
            _check_moments(self.layer, self.kind, moments)
        weights = {name: linear.weight.detach() for name, linear in self.linears.items()}
        return Block(self.layer, self.kind, weights, self.units, moments, self.weight_gradients, seed)

    def statistics(self, rule: Criterion, seed: int) -> BlockStatistics:
        """The block's curve, and its moments where they were summed; without `weight`."""
        block = self.block(seed)
        curve = rule.curve(block)
        if not bool(torch.isfinite(curve.cost).all()):
            raise WorkError(f"layer {self.layer} {self.kind}: the criterion gives costs that are not finite")
        return BlockStatistics(self.layer, self.kind, curve, block.moments)

    def release(self) -> None:
        self.inputs = self.gradients = None
        self.weight_gradients = {}

    def _take_input(self, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0].detach().flatten(0, -2)  # (tokens, n)
        add_gram_(self.inputs, x)  # type: ignore[arg-type]
        self.input_sum += x.sum(0, dtype=torch.float32)  # type: ignore[operator]
        self.tokens += len(x)

    def _watch_output(self, _module: nn.Module, _args: Any, output: torch.Tensor) -> None:
        output.register_hook(self._take_gradient)

    def _take_gradient(self, gradient: torch.Tensor) -> None:
        add_gram_(self.gradients, gradient.flatten(0, -2))  # type: ignore[arg-type]

    def _take_weight_gradient(self, name: str) -> Any:
        def take(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:
                self.weight_gradients[name] += parameter.grad.float()
                parameter.grad = None

        return take


def _run(model: PreTrainedModel, calibration: Calibration, backward: bool) -> None:
    """Send every batch through the model, and the summed next-token loss back where gradients are wanted."""
    from tqdm.auto import tqdm

    device = next(model.parameters()).device
    batches = list(split_batches(distributed.share(calibration.ids), model.config.vocab_size))
    with torch.set_grad_enabled(backward):
        for batch in tqdm(batches, desc="calibration", unit="batch", disable=None, leave=False):
            ids = batch.to(device)
            # gradients start at the embeddings' output, so that no weight needs one
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
    """The first block whose output is not finite, or the head, where all are; `embeds` as the pass gives them."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def look(_module: nn.Module, _args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if not bool(torch.isfinite(hidden).all()):
                found.append(name)

        return look

    layers: Any = model.get_decoder().layers
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            for kind, block in (("attention", layer.self_attn), ("mlp", layer.mlp)):
                if block is not None:
                    stack.callback(block.register_forward_hook(watch(f"layer {index} {kind}")).remove)
        model(inputs_embeds=embeds, use_cache=False)
    return found[0] if found else "the head"


def _check_moments(layer: int, kind: str, moments: Moments) -> None:
    for name, value in (("inputs", moments.inputs), ("output gradients", moments.gradients)):
        if value is not None and not bool(torch.isfinite(value).all()):
            raise WorkError(f"layer {layer} {kind}: {name} of {OUTPUT_PROJECTION[kind]} are not finite")
