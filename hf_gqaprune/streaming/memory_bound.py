"""Predict the peak memory of each stage from the sizes of the model.

A bound on memory never changes how the work is split, since results would then depend on it: it is met or refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..data import LOGITS_PER_BATCH, TOKENS_PER_BATCH
from ..errors import UsageError
from ..linalg import MOST_ROWS
from ..models import LOGITS_AT_ONCE, LayerShape, ModelShape
from ..statistics import Criterion, half_size
from ..utils import parse_size

#: libraries, their workspaces, what the allocator keeps, and pieces of tensors that are only cut
PROCESS = 3 << 28
#: what libraries and the heap keep of each layer, whose sizes are its own: kernels, and gaps; measured: 4 MiB
_KEPT = 6 << 20
_SHORT = 256  # tokens of a window that is proposed where windows are what takes the memory


@dataclass(frozen=True)
class Workload:
    """The work to be done within a bound on memory.

    Attributes:
        shape: of the model.
        itemsize: bytes of one of its weights.
        windows, seq_len: calibration windows; none where the criterion looks at weights alone.
        measured: the criterion, None where nothing is measured.
        refitted: whether `least_squares` is done.
        stored: bytes of a weight on disk; 0: as `itemsize`.
        text: what drawing the windows takes, as `sampling_bytes` estimates.
        gpu: whether layers are on a GPU.
    """

    shape: ModelShape
    itemsize: int
    windows: int
    seq_len: int
    measured: Criterion | None
    refitted: bool
    stored: int = 0
    text: int = 0
    gpu: bool = False

    @property
    def batch(self) -> int:
        """Return the tokens of the largest batch of `layer_batches`."""
        tokens = TOKENS_PER_BATCH if self.gpu else min(TOKENS_PER_BATCH, LOGITS_PER_BATCH // self.shape.vocab_size)
        return min(self.windows, max(1, tokens // max(1, self.seq_len))) * self.seq_len

    def stages(self) -> dict[str, int]:
        """Return the peak bytes of each stage beside `PROCESS`."""
        found = {"the calibration text": self.text} if self.text else {}
        if self.windows and (self.measured or self.refitted):
            found["the embeddings"] = self._vocabulary() + 3 * self.batch * self.shape.hidden_size * self.itemsize
        if self.measured and self.measured.calibrated and self.windows:
            found["the head"] = self._head()
        kept = _KEPT * len(self.shape.layers)
        for layer in set(self.shape.layers):
            if self.measured:
                _most(found, "measuring a layer", kept + self._measuring(self.measured, layer))
            if self.refitted:
                _most(found, "re-fitting a layer", kept + self._refitting(layer))
        return found

    def peak(self) -> tuple[str, int]:
        """Return the stage with the highest peak, and the memory of the process in it."""
        stages = {"the process": 0, **self.stages()}
        name = max(stages, key=lambda stage: stages[stage])
        return name, PROCESS + stages[name]

    def _vocabulary(self) -> int:
        """Count a weight of the embeddings' size, read in its stored dtype."""
        twice = self.stored if self.stored not in (0, self.itemsize) else 0
        return self.shape.vocab_size * self.shape.hidden_size * (self.itemsize + twice)

    def _head(self) -> int:
        """Count the head, the copy that its product makes, and some rows of logits with softmax and gradients."""
        logits = max(LOGITS_AT_ONCE, self.shape.vocab_size) * (2 * self.itemsize + 12)
        return 2 * self._vocabulary() + logits + 6 * self.batch * self.shape.hidden_size * 4

    def _weights(self, layer: LayerShape) -> int:
        return (self.shape.attention_parameters(layer) + self.shape.mlp_parameters(layer)) * self.itemsize

    def _largest(self, layer: LayerShape) -> int:
        return max(layer.ffn, layer.query_heads * layer.head_dim) * self.shape.hidden_size * self.itemsize

    def _activations(self, layer: LayerShape) -> int:
        """Count what one batch keeps of a layer for the backward pass, the norms in float32."""
        width = layer.query_heads * layer.head_dim
        return self.batch * (10 * self.shape.hidden_size + 8 * width + 6 * layer.ffn) * max(self.itemsize, 3)

    def _measuring(self, rule: Criterion, layer: LayerShape) -> int:
        """Count a layer, its sums, and either a batch in it or the greedy removal in its widest block."""
        d, attention, ffn = self.shape.hidden_size, layer.query_heads * layer.head_dim, layer.ffn
        weights = self._weights(layer)
        if not self.windows:
            # one matrix in float32 and in float64
            return weights + 12 * self._largest(layer) // self.itemsize
        sums = 4 * (attention**2 + ffn**2)
        if rule.output_gradients:
            sums += 2 * 4 * d**2
        wide = max(attention, ffn)
        passing = self._activations(layer) + 2 * 4 * self.batch * wide
        if rule.output_gradients:
            # what goes into both projections waits for its gradient, and is weighted by it in float32
            passing += self.batch * ((attention + ffn) * self.itemsize + 4 * wide)
        scoring = 2 * 2 * wide**2 + 4 * self._largest(layer)  # the triangle, and the file that is made of it
        if rule.output_gradients:
            strip = 8 * wide * min(wide, MOST_ROWS)
            # the inverse, A, W; for KV groups both matrices gathered, then cut
            scoring = max(scoring, 8 * (2 * ffn**2 + ffn * d) + 2 * strip, 8 * (9 * attention**2 + attention * d))
        if rule.weight_gradients:
            parameters = weights // self.itemsize
            sums += 4 * parameters + weights // 2
            scoring = max(scoring, 4 * parameters + 8 * d * wide)
        return weights + sums + max(passing, scoring)

    def _refitting(self, layer: LayerShape) -> int:
        """Count a layer before and after, two sets of sums, and either a product being added or a solution."""
        d, wide = self.shape.hidden_size, max(layer.query_heads * layer.head_dim, layer.ffn)
        alone = self._weights(layer) + 6 * wide**2 + 8 * wide**2 + 8 * 3 * wide * d
        if not self.windows:
            return self._weights(layer) + alone
        sums = 2 * 8 * (wide**2 + wide * d)
        adding = 12 * MOST_ROWS * wide + 4 * self.batch * (wide + 2 * d) + self._activations(layer) // 3
        # sums and solutions as wide as the model, and the weights times one
        inputs = 8 * 9 * d**2 + 8 * 2 * wide * d
        return 2 * self._weights(layer) + max(alone, inputs, sums + max(adding, 8 * 2 * wide * d + 8 * MOST_ROWS * wide))


def check_memory_bound(work: Workload, memory: str) -> int:
    """Return how many bytes of `memory`, a size, the work leaves free.

    Raises:
        UsageError: the work needs more; the message names the stage and alternatives.
    """
    bound = parse_size(memory)
    stage, needed = work.peak()
    if needed <= bound:
        return bound - needed
    ways = [f"give --memory {_gib(needed)}"]
    others = {
        "--compensation none": replace(work, refitted=False),
        f"--seq-len {_SHORT}": replace(work, seq_len=min(_SHORT, work.seq_len)),
    }
    for flag, other in others.items():
        least = other.peak()[1]
        if least < needed and least <= bound:
            ways.append(f"{flag} ({_gib(least)})")
    raise UsageError(f"--memory {memory} is too little: {stage} needs {_gib(needed)} in all: {', or '.join(ways)}")


def moments_disk_bytes(source: ModelShape, rule: Criterion) -> list[int]:
    """Return the bytes of each layer's moments on disk: float32, about half of each square."""
    return [4 * sum(map(half_size, widths)) for widths in _moments(source, rule)]


def _moments(source: ModelShape, rule: Criterion) -> list[list[int]]:
    """Return the widths of each layer's second moments."""
    gradients = 2 * [source.hidden_size] if rule.output_gradients else []
    return [[s.query_heads * s.head_dim, s.ffn, *gradients] for s in source.layers]


def check_gpu_memory(shape: ModelShape, itemsize: int, measured: Criterion | None, total: int) -> None:
    """Raise [`UsageError`] if a GPU of `total` bytes cannot hold a whole model and the sums of all its layers."""
    sums = 0 if measured is None else sum(4 * width**2 for widths in _moments(shape, measured) for width in widths)
    least = shape.cost.parameters * itemsize + sums
    if least > total:
        raise UsageError(
            f"in memory this model takes more than {_gib(least)}, and the GPU has {total / 2**30:.2f}GiB: --memory SIZE "
            "(prune.memory in a recipe) reads it layer by layer, --device auto takes all GPUs"
        )


def _most(found: dict[str, int], name: str, size: int) -> None:
    found[name] = max(size, found.get(name, 0))


def _gib(size: int) -> str:
    """Format in GiB, rounded up, so that the printed size suffices."""
    return f"{math.ceil(size / 2**30 * 100) / 100:.2f}GiB"
