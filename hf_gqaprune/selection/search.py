"""Improve an allocation by measured divergence from the dense model.

Removal curves add the costs of blocks as if they were independent. The search measures their joint cost: the divergence
of the masked dense model, with refitted output projections, on the held-out calibration windows.
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
from ..models import OUTPUT_PROJECTION, Key, TopLogProbs, eval_without_grad, top_kl_divergence, top_log_probs
from ..statistics import Statistics
from ..utils import Progress, distributed
from .budget import Budget

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: fractions of an FFN traded at a time; attention blocks always trade one group
_SHARES = (1 / 8, 1 / 32)
#: pairs tried, the most promising first, before the fraction is lowered
_PAIRS = 6
#: minimum relative decrease of the divergence by a trade
_GAIN = 1e-3
#: predictions of the dense model stored per token; all others count as one outcome
_TOP = 128
Counts = dict[Key, int]


def refine(model: PreTrainedModel, statistics: Statistics, budget: Budget, start: Mapping[Key, int]) -> Counts:
    """Trade units of equal size between two blocks at a time as long as the measured KL(dense || pruned) decreases.

    Pairs are ranked by the change of the divergence when each block alone loses or regains units, and traded only if
    their joint divergence decreases: by this measure the result is never worse than `start`.

    Args:
        model: the dense causal LM; restored afterwards.
        statistics: curves and moments of `model`, and at least eight calibration windows.
        budget: limits and sizes; the result misses it by half an FFN channel (half a lot), or by as much as `start`.
        start: units removed per block.

    Returns:
        Units removed per block.

    Raises:
        UsageError: the statistics have no moments or no held-out windows.
        WorkError: a divergence is nan.
    """
    calibration = statistics.calibration
    if calibration is None or not len(calibration.held_out):
        raise UsageError("allocation search measures on held-out windows: calibrate with 8 windows or more (--samples)")
    if not all(statistics.blocks[key].has_moments for key in budget.units):
        raise UsageError("allocation search needs statistics with moments: collect them with moments=True")
    with eval_without_grad(model), torch.no_grad(), _masked(model, statistics, budget) as candidate:
        held_out = distributed.shard(calibration.held_out)
        targets = [_Target.of(model, ids) for ids in split_batches(held_out, model.config.vocab_size)]
        for key, count in start.items():
            candidate.mask(key, count)
        with Progress("search", "plan") as bar:
            return _Descent(model, candidate, targets, budget, dict(start), bar).run()


class _Descent:
    """State of the descent: the current counts and their divergence."""

    def __init__(
        self, model: Any, candidate: _Candidate, targets: list[_Target], budget: Budget, counts: Counts, bar: Any
    ) -> None:
        self.model, self.candidate, self.targets = model, candidate, targets
        self.budget, self.counts, self.bar = budget, counts, bar
        self.tolerance = max(abs(self._miss(counts)), *(budget.unit[k] / 2 for k in counts if k[1] == "mlp"), 0)
        self.best = self._divergence()

    def run(self) -> Counts:
        """Trade until no pair helps, in decreasing fractions; return the counts."""
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
        """Make the first trade that lowers the divergence, and return its pair; None if there is none."""
        for receiver, donor, counts in self._swaps(rates, share)[:_PAIRS]:
            before = {key: self.counts[key] for key in (receiver, donor)}
            for key in before:
                self.candidate.mask(key, counts[key])
            divergence = self._divergence()
            if divergence < self.best * (1 - _GAIN):
                self.best, self.counts = divergence, counts
                return receiver, donor
            for key, count in before.items():
                self.candidate.mask(key, count)
        return None

    def _swaps(self, rates: Mapping[tuple[Key, int], float], share: float) -> list[tuple[Key, Key, Counts]]:
        """Return pairs expected to lower the divergence, with the counts after the trade, the best first."""
        swaps = []
        for receiver in self.counts:
            for donor in self.counts:
                counts = self._traded(receiver, donor, share) if receiver != donor else None
                if counts is None:
                    continue
                freed = [
                    self.budget.freed(key, counts[key]) - self.budget.freed(key, self.counts[key])
                    for key in (receiver, donor)
                ]
                change = freed[0] * rates[receiver, -1] + freed[1] * rates[donor, 1]
                if change < 0:
                    swaps.append((change, (receiver, donor, counts)))
        return [swap for _, swap in sorted(swaps, key=lambda item: item[0])]

    def _traded(self, receiver: Key, donor: Key, share: float) -> Counts | None:
        """Return the counts after `donor` loses units and `receiver` regains some; None if the budget forbids it."""
        counts = dict(self.counts)
        counts[receiver] -= self._step(receiver, share)
        counts[donor] += self._step(donor, share)
        flexible = next((key for key in (donor, receiver) if key[1] == "mlp"), None)
        if flexible:
            # KV groups and FFN channels differ in size: round to the nearest number of channels
            counts[flexible] -= round(self._miss(counts) / self.budget.unit[flexible])
        possible = all(0 <= counts[key] <= self.budget.removable[key] for key in (receiver, donor))
        moved = counts[receiver] < self.counts[receiver] and counts[donor] > self.counts[donor]
        return counts if possible and moved and abs(self._miss(counts)) <= self.tolerance + 1e-6 else None

    def _step(self, key: Key, share: float) -> int:
        return 1 if key[1] == "attention" else max(1, round(share * self.budget.units[key]))

    def _miss(self, counts: Counts) -> float:
        """Return how many parameters `counts` removes beyond the budget."""
        return sum(self.budget.freed(key, count) for key, count in counts.items()) - self.budget.parameters

    def _rate(self, key: Key, change: int) -> float:
        """Return the change of the divergence per parameter freed by this block alone; infinite if the block cannot change."""
        start = self.counts[key]
        count = max(0, min(self.budget.removable[key], start + change))
        freed = self.budget.freed(key, count) - self.budget.freed(key, start)
        if not freed:
            return torch.inf if change > 0 else -torch.inf
        self.candidate.mask(key, count)
        divergence = self._divergence()
        self.candidate.mask(key, start)
        return (divergence - self.best) / freed

    def _divergence(self) -> float:
        self.bar.update()
        some = self.model.get_input_embeddings().weight
        total = distributed.all_reduce_scalar(sum(target.divergence(self.model) for target in self.targets), some)
        if total != total:
            raise WorkError("the divergence of a candidate from the dense model is nan: load the model in float32 or bfloat16")
        return total


class _Candidate:
    """The dense model with masked and refitted output projections."""

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

    def mask(self, key: Key, count: int) -> None:
        """Mask the first `count` units of a block's removal curve and refit its other columns."""
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
        """Put the dense weights back."""
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
    """Predictions of the dense model for some windows.

    Attributes:
        ids: int64 `(windows, seq_len)`.
        top: log-probabilities of its most likely tokens, `(windows, seq_len, k)`.
    """

    ids: torch.Tensor
    top: TopLogProbs

    @staticmethod
    def of(model: Any, ids: torch.Tensor) -> _Target:
        """Run the dense model on `ids`."""
        return _Target(ids, top_log_probs(_logits(model, ids), _TOP))

    def divergence(self, model: Any) -> float:
        """Sum the divergence of `model` from the dense model over tokens, in nats."""
        return float(top_kl_divergence(_logits(model, self.ids), self.top).sum(dtype=torch.float64))


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits `(windows, seq_len, vocabulary)`."""
    device = model.get_input_embeddings().weight.device
    logits: torch.Tensor = model(input_ids=ids.to(device), use_cache=False).logits
    return logits
