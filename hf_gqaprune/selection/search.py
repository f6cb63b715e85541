"""Removal counts, statistics and a dense model in; counts of the same budget that keep the predictions better out.

Curves add up what each block costs by itself. The search measures what the blocks cost together: the divergence of the
masked dense model, its output projections re-fitted, on the held-out calibration windows. These choose ridges, step
lengths and trades; the moments and curves have seen them with all the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..compensation import refit_columns
from ..data import split_batches
from ..dependency_graph import trace_units
from ..errors import UsageError, WorkError
from ..models import OUTPUT_PROJECTION, Key, eval_without_grad
from ..statistics import Statistics
from ..utils import distributed
from .budget import Budget

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: shares of an FFN that change hands at a time; of attention blocks it is always one group
_SHARES = (1 / 8, 1 / 32)
#: pairs that are tried, the most promising first, before the share is lowered
_PAIRS = 6
#: a swap has to lower the divergence by this fraction
_GAIN = 1e-3
#: predictions of the dense model that are kept per token; all others count as one
_TOP = 128
Counts = dict[Key, int]


def refine(model: PreTrainedModel, statistics: Statistics, budget: Budget, start: Mapping[Key, int]) -> Counts:
    """Coordinate descent on measured KL(dense || pruned): two blocks at a time trade units of equal size.

    How the divergence changes when a block alone gives or gets units ranks the pairs; a pair is traded only where the
    divergence of both together falls, so that the result is never worse than `start` by this measure.

    Args:
        model: the dense causal LM; unchanged afterwards.
        statistics: curves and moments of `model`, with the calibration windows, eight at least.
        budget: limits and sizes; the result misses it by half an FFN channel (half a lot) or by what `start` does.
        start: units removed per block.

    Returns:
        Units removed per block.

    Raises:
        UsageError: statistics without moments, or without held-out windows.
        WorkError: a divergence that is not finite.
    """
    from tqdm.auto import tqdm

    calibration = statistics.calibration
    if calibration is None or not len(calibration.held_out):
        raise UsageError("allocation search measures on held-out windows: calibrate with 8 windows or more (--samples)")
    if not all(statistics.blocks[key].has_moments for key in budget.units):
        raise UsageError("allocation search needs statistics with moments: collect them with moments=True")
    with eval_without_grad(model), torch.no_grad(), _masked(model, statistics, budget) as candidate:
        held_out = distributed.shard(calibration.held_out)
        targets = [_Target.of(model, ids) for ids in split_batches(held_out, model.config.vocab_size)]
        for key, count in start.items():
            candidate.place(key, count)
        with tqdm(desc="searching", unit="plan", disable=None, leave=False) as bar:
            return _Descent(model, candidate, targets, budget, dict(start), bar).run()


class _Descent:
    """Where the search is, and what it knows of the ways on."""

    def __init__(
        self, model: Any, candidate: _Candidate, targets: list[_Target], budget: Budget, counts: Counts, bar: Any
    ) -> None:
        self.model, self.candidate, self.targets = model, candidate, targets
        self.budget, self.counts, self.bar = budget, counts, bar
        self.tolerance = max(abs(self._miss(counts)), *(budget.unit[k] / 2 for k in counts if k[1] == "mlp"), 0)
        self.best = self._divergence()

    def run(self) -> Counts:
        """Trade until no pair helps, in finer and finer shares."""
        for share in _SHARES:
            rates: dict[tuple[Key, int], float] = {}
            while True:
                for key in self.counts:
                    for sign in (-1, 1):
                        if (key, sign) not in rates:
                            rates[key, sign] = self._rate(key, sign * self._step(key, share))
                swap = self._first_better(rates, share)
                if swap is None:
                    break
                for key in swap:
                    rates.pop((key, -1)), rates.pop((key, 1))
        return self.counts

    def _first_better(self, rates: Mapping[tuple[Key, int], float], share: float) -> tuple[Key, Key] | None:
        """Trade the most promising pair that helps, and name it."""
        for gets, gives, counts in self._swaps(rates, share)[:_PAIRS]:
            before = {key: self.counts[key] for key in (gets, gives)}
            for key in before:
                self.candidate.place(key, counts[key])
            found = self._divergence()
            if found < self.best * (1 - _GAIN):
                self.best, self.counts = found, counts
                return gets, gives
            for key, count in before.items():
                self.candidate.place(key, count)
        return None

    def _swaps(self, rates: Mapping[tuple[Key, int], float], share: float) -> list[tuple[Key, Key, Counts]]:
        """Pairs that are expected to lower the divergence, and the counts after the trade, the best first."""
        found = []
        for gets in self.counts:
            for gives in self.counts:
                counts = self._traded(gets, gives, share) if gets != gives else None
                if counts is None:
                    continue
                freed = [
                    self.budget.freed(key, counts[key]) - self.budget.freed(key, self.counts[key])
                    for key in (gets, gives)
                ]
                change = freed[0] * rates[gets, -1] + freed[1] * rates[gives, 1]
                if change < 0:
                    found.append((change, (gets, gives, counts)))
        return [swap for _, swap in sorted(found, key=lambda item: item[0])]

    def _traded(self, gets: Key, gives: Key, share: float) -> Counts | None:
        """The counts after `gives` has lost units and `gets` got some back; None where the budget does not allow it."""
        counts = dict(self.counts)
        counts[gets] -= self._step(gets, share)
        counts[gives] += self._step(gives, share)
        flexible = next((key for key in (gives, gets) if key[1] == "mlp"), None)
        if flexible:
            # a KV group and a number of channels are of one size only nearly
            counts[flexible] -= round(self._miss(counts) / self.budget.unit[flexible])
        possible = all(0 <= counts[key] <= self.budget.removable[key] for key in (gets, gives))
        moved = counts[gets] < self.counts[gets] and counts[gives] > self.counts[gives]
        return counts if possible and moved and abs(self._miss(counts)) <= self.tolerance + 1e-6 else None

    def _step(self, key: Key, share: float) -> int:
        return 1 if key[1] == "attention" else max(1, round(share * self.budget.units[key]))

    def _miss(self, counts: Counts) -> float:
        """Parameters removed beyond the budget."""
        return sum(self.budget.freed(key, count) for key, count in counts.items()) - self.budget.parameters

    def _rate(self, key: Key, change: int) -> float:
        """Change of the divergence per parameter that a block alone frees; infinite where it cannot."""
        start = self.counts[key]
        count = max(0, min(self.budget.removable[key], start + change))
        freed = self.budget.freed(key, count) - self.budget.freed(key, start)
        if not freed:
            return torch.inf if change > 0 else -torch.inf
        self.candidate.place(key, count)
        found = self._divergence()
        self.candidate.place(key, start)
        return (found - self.best) / freed

    def _divergence(self) -> float:
        self.bar.update()
        some = self.model.get_input_embeddings().weight
        total = distributed.all_reduce_scalar(sum(target.divergence(self.model) for target in self.targets), some)
        if total != total:
            raise WorkError("the divergence of a candidate from the dense model is not a number: activations overflow")
        return total


class _Candidate:
    """A dense model some of whose output projections are masked and re-fitted."""

    def __init__(self, model: Any, statistics: Statistics, budget: Budget) -> None:
        slices = trace_units(statistics.source.layers)
        self.budget, self.statistics = budget, statistics
        self.linears = {
            (layer, kind): model.get_decoder().layers[layer].get_submodule(OUTPUT_PROJECTION[kind])
            for layer, kind in budget.units
        }
        self.columns = {
            (layer, kind): slices[layer].units(kind)[OUTPUT_PROJECTION[kind]][1] for layer, kind in budget.units
        }
        self.dense = {
            key: {name: parameter.data for name, parameter in linear.named_parameters()}
            for key, linear in self.linears.items()
        }

    def place(self, key: Key, count: int) -> None:
        """Let a block be without the first `count` units of its curve."""
        block, dense = self.statistics.blocks[key], self.dense[key]
        removed = self.budget.unpacked({key: count})[key]
        kept = block.curve.order[removed:].sort().values
        linear = self.linears[key]
        if not removed:
            weight = dense["weight"]
        else:
            weight = torch.zeros_like(dense["weight"])
            columns = self.columns[key][kept].flatten().sort().values
            moments = block.moments
            if len(columns) and moments is not None:
                weight[:, columns] = refit_columns(dense["weight"], moments, columns)
        linear.weight.data = weight
        if "bias" in dense:
            linear.bias.data = dense["bias"] if len(kept) else torch.zeros_like(dense["bias"])

    def restore(self) -> None:
        for key, linear in self.linears.items():
            for name, tensor in self.dense[key].items():
                linear.get_parameter(name).data = tensor


@contextmanager
def _masked(model: Any, statistics: Statistics, budget: Budget) -> Iterator[_Candidate]:
    candidate = _Candidate(model, statistics, budget)
    try:
        yield candidate
    finally:
        candidate.restore()


@dataclass(frozen=True)
class _Target:
    """What the dense model predicts of some windows.

    Attributes:
        ids: int64 `(windows, seq_len)`.
        top: int64 `(windows, seq_len, k)`, its most likely tokens.
        log_probs: float32, their log probabilities.
        rest: float32 `(windows, seq_len)`, log probability of all other tokens together.
    """

    ids: torch.Tensor
    top: torch.Tensor
    log_probs: torch.Tensor
    rest: torch.Tensor

    @staticmethod
    def of(model: Any, ids: torch.Tensor) -> _Target:
        whole = _log_probs(model, ids)
        log_probs, top = whole.topk(min(_TOP, whole.shape[-1]), dim=-1)
        return _Target(ids, top, log_probs, _others(log_probs))

    def divergence(self, model: Any) -> float:
        """KL in nats, summed over tokens, of the distribution over the top tokens and everything else.

        A lower bound of the KL over the vocabulary (data processing inequality), and equal to it where it is no larger
        than the top.
        """
        given = _log_probs(model, self.ids).gather(-1, self.top)
        total = (self.log_probs.exp() * (self.log_probs - given)).sum(-1)
        total += self.rest.exp() * (self.rest - _others(given))
        return float(total.sum(dtype=torch.float64))


def _others(log_probs: torch.Tensor) -> torch.Tensor:
    """Log of the probability that is left; of what rounding makes of nothing, the least that counts."""
    return torch.log1p(-log_probs.exp().sum(-1).clamp(max=1 - 1e-6))


def _log_probs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """float32 `(windows, seq_len, vocabulary)`."""
    device = model.get_input_embeddings().weight.device
    return model(input_ids=ids.to(device), use_cache=False).logits.float().log_softmax(-1)
