"""Measure the importance of every decoder layer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch.nn import functional as F

from ..data import Calibration, split_batches
from ..errors import WorkError, unknown
from ..models import eval_without_grad, token_losses
from ..utils import track


def measure_layers(model: Any, calibration: Calibration, *, measure: str = "similarity") -> list[float]:
    """Measure every decoder layer for `make_plan(..., allocation="layer_importance", layer_scores=...)`.

    Args:
        model: a Llama or pruned Llama causal LM; left unchanged.
        calibration: its `fitted` windows are used.
        measure: `similarity` (one pass) or `perplexity` (one pass per layer), see `MEASURES`.

    Returns:
        One score per layer; higher is more important.

    Raises:
        UsageError: the measure is unknown.
        WorkError: a layer's score is not finite.
    """
    if measure not in MEASURES:
        raise unknown("measure of layer importance", measure, MEASURES)
    with eval_without_grad(model), torch.no_grad():
        scores = MEASURES[measure](model, calibration)
    for index, score in enumerate(scores):
        if not abs(score) < float("inf"):
            raise WorkError(f"layer {index}: importance by {measure} is {score}: the model's activations overflow")
    return scores


def similarity(model: Any, calibration: Calibration) -> list[float]:
    """Return 1 - the mean cosine of each layer's input and output hidden states over tokens, from 0 to 2.

    Block Influence of ShortGPT (Men et al. 2024, arXiv:2403.03853, eq. 1).
    """
    layers = model.get_decoder().layers
    sums = [0.0] * len(layers)

    def add_cosines(index: int) -> Callable[..., None]:
        def add(_module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            cosines = F.cosine_similarity(args[0].float(), output.float(), dim=-1)  # (windows, seq_len)
            sums[index] += float(cosines.sum(dtype=torch.float64))

        return add

    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(add_cosines(index)).remove)
        for ids in split_batches(calibration.fitted, model.config.vocab_size):
            model.get_decoder()(input_ids=ids.to(model.get_input_embeddings().weight.device), use_cache=False)
    return [1 - total / calibration.fitted.numel() for total in sums]


def perplexity(model: Any, calibration: Calibration) -> list[float]:
    """Return the increase of the log perplexity when each layer is bypassed, in nats per token; negative if that helps.

    The removal of single layers as in Shortened LLaMA (Kim et al. 2024, arXiv:2402.02834); the logarithm keeps
    one layer whose removal ruins the model from hiding the differences between all others.
    """
    whole = _nats(model, calibration)
    scores = []
    for layer in track(model.get_decoder().layers, "layer importance", "layer"):
        # the layer still runs, but its input is passed on
        with ExitStack() as stack:
            stack.callback(layer.register_forward_hook(lambda _module, args, _output: args[0]).remove)
            scores.append(_nats(model, calibration) - whole)
    return scores


Measure = Callable[[Any, Calibration], list[float]]
MEASURES: dict[str, Measure] = {"similarity": similarity, "perplexity": perplexity}


def _nats(model: Any, calibration: Calibration) -> float:
    """Return the mean cross-entropy of the next token, in nats."""
    batches = split_batches(calibration.fitted, model.config.vocab_size)
    return sum(float(token_losses(model, ids, 1).sum()) for ids in batches) / calibration.fitted[:, 1:].numel()
