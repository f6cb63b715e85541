"""A model and calibration windows go in; how much the model needs each of its layers comes out, one number per layer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch.nn import functional as F

from ..data import Calibration, split_batches
from ..errors import WorkError, unknown
from ..models import eval_without_grad


def measure_layers(model: Any, calibration: Calibration, *, measure: str = "similarity") -> list[float]:
    """The importance of every decoder layer, for `make_plan(..., allocation="layer_importance", layer_scores=...)`.

    Args:
        model: a Llama or pruned Llama causal LM; left as it was.
        calibration: its `fitted` windows are used.
        measure: `similarity` (one pass) or `perplexity` (one pass per layer), see `MEASURES`.

    Raises:
        UsageError: for an unknown measure.
        WorkError: a layer's score is not finite.
    """
    if measure not in MEASURES:
        raise unknown("measure of layer importance", measure, MEASURES)
    with eval_without_grad(model), torch.no_grad():
        scores = MEASURES[measure](model, calibration)
    for index, score in enumerate(scores):
        if not abs(score) < float("inf"):
            raise WorkError(f"layer {index}: its importance by {measure} is {score}: the model's activations overflow")
    return scores


def similarity(model: Any, calibration: Calibration) -> list[float]:
    """1 - mean cosine of a layer's input and output hidden states over tokens, 0 ... 2 per layer.

    Block Influence of ShortGPT (Men et al. 2024, arXiv:2403.03853, eq. 1).
    """
    layers = model.get_decoder().layers
    sums = [0.0] * len(layers)

    def watch(index: int) -> Callable[..., None]:
        def add(_module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            cosines = F.cosine_similarity(args[0].float(), output.float(), dim=-1)  # (windows, seq_len)
            sums[index] += float(cosines.sum(dtype=torch.float64))

        return add

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for index, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(watch(index)).remove)
        _nats(model, calibration)
    return [1 - total / calibration.fitted.numel() for total in sums]


def perplexity(model: Any, calibration: Calibration) -> list[float]:
    """Rise of the log perplexity when a layer is bypassed, in nats per token; below 0 for a layer that does harm.

    The removal of single layers as in Shortened LLaMA (Kim et al. 2024, arXiv:2402.02834); logarithms keep one layer
    whose removal ruins the model from dwarfing the differences between all others.
    """
    from tqdm.auto import tqdm

    whole = _nats(model, calibration)
    scores = []
    for layer in tqdm(model.get_decoder().layers, desc="layers", unit="layer", disable=None, leave=False):
        # the layer still runs, but what it was given is passed on
        with ExitStack() as stack:
            stack.callback(layer.register_forward_hook(lambda _module, args, _output: args[0]).remove)
            scores.append(_nats(model, calibration) - whole)
    return scores


Measure = Callable[[Any, Calibration], list[float]]
MEASURES: dict[str, Measure] = {"similarity": similarity, "perplexity": perplexity}


def _nats(model: Any, calibration: Calibration) -> float:
    """Mean cross-entropy of the next token."""
    device = model.get_input_embeddings().weight.device
    total, tokens = 0.0, 0
    for batch in split_batches(calibration.fitted, model.config.vocab_size):
        ids = batch.to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        total += float(F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum"))
        tokens += ids[:, 1:].numel()
    return total / tokens
