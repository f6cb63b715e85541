"""Check the weights of a model, and restore the modes and flags that a pass over it changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import UsageError, WorkError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: rows of a weight that are looked at together
_ROWS = 4096


def check_materialized(model: nn.Module) -> None:
    """Raise [`UsageError`] where a weight of `model` is on no device, as what `device_map` has offloaded."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UsageError(
                f"{name} is offloaded, or the model has no weights: a model that the devices do not hold is pruned layer by "
                "layer, with --memory SIZE, or stream_statistics and prune_checkpoint"
            )


def check_loaded(model: PreTrainedModel) -> None:
    """Raise [`UsageError`] if `model` holds an adapter; untie its config if its head differs from its embeddings.

    transformers loads a checkpoint with such a head untied, but leaves the config as it was.
    """
    if getattr(model, "peft_config", None):
        raise UsageError("the model holds a LoRA adapter: merge it first, with model = model.merge_and_unload()")
    embeddings, head = (module.weight for module in (model.get_input_embeddings(), model.get_output_embeddings()))
    if model.config.tie_word_embeddings and head is not embeddings and not (head.is_meta or embeddings.is_meta):
        model.config.tie_word_embeddings = head.shape == embeddings.shape and torch.equal(head, embeddings.to(head.device))


@contextmanager
def eval_without_grad(model: PreTrainedModel) -> Iterator[None]:
    """Put every module into eval mode and freeze every parameter; restore both, module by module."""
    training = [module for module in model.modules() if module.training]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def requiring_grad(parameter: torch.Tensor) -> Iterator[None]:
    flag, gradient = parameter.requires_grad, parameter.grad
    parameter.requires_grad_(True)
    parameter.grad = None
    try:
        yield
    finally:
        parameter.requires_grad_(flag)
        parameter.grad = gradient


def check_weights(layers: Mapping[int, nn.Module]) -> None:
    """Raise [`WorkError`] for a weight of `{index: layer}` that is not finite."""
    for index, layer in layers.items():
        for name, parameter in layer.named_parameters():
            check_finite(f"layer {index}: {name}", parameter)


def check_outer_weights(model: PreTrainedModel) -> None:
    """Raise [`WorkError`] for embeddings, a last norm or a head that is not finite."""
    for name, parameter in model.named_parameters():
        if ".layers." not in name:
            check_finite(name, parameter)


def check_finite(name: str, parameter: torch.Tensor) -> None:
    """Raise [`WorkError`] for a weight, called `name`, that is not finite; on the meta device there is nothing to see."""
    # looking at all of it at once takes twice its memory
    if parameter.device.type != "meta" and not all(bool(torch.isfinite(rows).all()) for rows in parameter.split(_ROWS)):
        raise WorkError(f"{name} holds values that are not finite; repair the checkpoint first")
