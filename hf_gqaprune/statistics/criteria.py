"""Turn a block's weights and statistics into its removal curve: the order of removal and its cumulative cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ..linalg import invert_, remove_within, weighted_gram
from ..models import OUTPUT_PROJECTION
from .moments import Curve, Moments

UnitIndex = Mapping[str, tuple[int, torch.Tensor]]


@dataclass(frozen=True)
class Block:
    """The input of a criterion: the attention or the FFN of one layer.

    Attributes:
        layer, kind: which block; `kind` is `"attention"` or `"mlp"`.
        weights: `{projection: (out_features, in_features)}` in any float dtype.
        units: `{projection: (dim, index)}`, `index` int64 `(n_units, width)`: rows (dim 0) or columns (dim 1) per unit.
        moments: second moments of calibration, if the criterion needs them.
        gradients: `{projection: (out_features, in_features)}` float32, the loss gradient summed over calibration.
        seed: for random criteria.
    """

    layer: int
    kind: str
    weights: Mapping[str, torch.Tensor]
    units: UnitIndex
    moments: Moments | None = None
    gradients: Mapping[str, torch.Tensor] = field(default_factory=dict)
    seed: int = 0

    @property
    def output(self) -> str:
        """Return the name of the projection that reads the units."""
        return OUTPUT_PROJECTION[self.kind]

    @property
    def columns(self) -> torch.Tensor:
        """Return the output projection's input columns per unit, int64 `(n_units, width)`."""
        return self.units[self.output][1]

    def per_unit(self, value: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """Sum `value(name)`, shaped like the weight `name`, over the weights of each unit: float64 `(n_units,)`."""
        total = torch.zeros(len(self.columns), dtype=torch.float64)
        for name in self.weights:
            dim, index = self.units[name]
            total += value(name).double().sum(1 - dim).cpu()[index].sum(1)
        return total


@dataclass(frozen=True)
class Criterion:
    """A registered criterion: its function and the measurements it needs."""

    curve: Callable[[Block], Curve]
    moments: bool = False
    output_gradients: bool = False
    weight_gradients: bool = False

    @property
    def calibrated(self) -> bool:
        """Return whether the criterion needs calibration text."""
        return self.moments or self.output_gradients or self.weight_gradients


def random(block: Block) -> Curve:
    """Draw uniformly random scores, the baseline of every other criterion."""
    generator = torch.Generator().manual_seed((block.seed * 1_000_003 + block.layer * 2 + (block.kind == "mlp")) % (1 << 63))
    return Curve.from_scores(torch.rand(len(block.columns), generator=generator, dtype=torch.float64))


def magnitude(block: Block) -> Curve:
    """Score a unit by the squared L2 norm of its weights (Han et al. 2015, arXiv:1506.02626)."""
    return Curve.from_scores(block.per_unit(lambda name: block.weights[name].float().square()))


def magnitude_l1(block: Block) -> Curve:
    """Score a unit by the L1 norm of its weights (Li et al. 2017, arXiv:1608.08710)."""
    return Curve.from_scores(block.per_unit(lambda name: block.weights[name].float().abs()))


def taylor(block: Block) -> Curve:
    """Sum the absolute first-order Taylor terms of a unit's weights: sum |w * dL/dw|.

    The element-wise importance of LLM-Pruner (Ma et al. 2023, arXiv:2305.11627, eq. 3 without its second-order part).
    """
    return Curve.from_scores(block.per_unit(lambda name: (block.weights[name].float() * block.gradients[name]).abs()))


def taylor_unit(block: Block) -> Curve:
    """Take the absolute first-order Taylor term of the whole unit: |sum w * dL/dw|.

    The vector-wise importance of LLM-Pruner (Ma et al. 2023, arXiv:2305.11627).
    """
    return Curve.from_scores(block.per_unit(lambda name: block.weights[name].float() * block.gradients[name]).abs())


def taylor_signed(block: Block) -> Curve:
    """Estimate the signed change of the loss when a unit is removed: -sum w * dL/dw (Molchanov et al., arXiv:1611.06440).

    Scores are shifted per block so that the lowest is zero: the ranking is unchanged and cumulative costs do not decrease.
    """
    scores = -block.per_unit(lambda name: block.weights[name].float() * block.gradients[name])
    return Curve.from_scores(scores - scores.min())


def wanda(block: Block) -> Curve:
    """Sum |W_ij| * ||x_j|| over a unit's columns of the output projection.

    Wanda's metric (Sun et al. 2024, arXiv:2306.11695) on structures, as in FLAP's Wanda-sp (arXiv:2312.11983).
    """
    assert block.moments is not None  # noqa: S101  (registered with moments=True)
    norms = block.moments.inputs.diagonal().clamp(min=0).sqrt()
    columns = (block.weights[block.output].float().abs().sum(0) * norms).cpu()
    return Curve.from_scores(columns.double()[block.columns].sum(1))


def flap(block: Block) -> Curve:
    """Standardise a unit's fluctuation, the sum of Var(x_j) * ||W_:j||^2 over its columns, within its block.

    This is WIFV of FLAP (An et al. 2024, arXiv:2312.11983, eq. 5 and 6). FLAP removes the units with the lowest
    standardised score z regardless of their size, while the allocation `global` minimises cost per parameter.
    Therefore a unit costs exp(z) times its number of parameters: the cost per parameter is positive, depends on z
    alone and increases with z. The factor N / (N - 1) of the sample variance cancels in z.
    """
    assert block.moments is not None  # noqa: S101  (registered with moments=True)
    mean = block.moments.input_mean.double()
    variance = (block.moments.inputs.diagonal().double() - mean.square()).clamp(min=0)
    columns = (variance * block.weights[block.output].double().square().sum(0)).cpu()
    scores = columns[block.columns].sum(1)  # (n_units,)
    spread = float(scores.std()) if len(scores) > 1 else 0.0
    # units that differ by rounding errors only get z = 0
    z = (scores - scores.mean()) / spread if spread > 1e-12 * float(scores.max()) else torch.zeros_like(scores)
    parameters = sum(index.shape[1] * block.weights[name].shape[1 - dim] for name, (dim, index) in block.units.items())
    return Curve.from_scores(parameters * z.exp())


def curvature(block: Block) -> Curve:
    """Remove units greedily under a Kronecker-factored Fisher, refitting the other columns after each removal.

    A removal costs the increase of tr(G dW H dW^T), with H the second moment of the output projection's inputs and G
    that of the loss gradient at its outputs: Optimal Brain Surgeon (Hassibi & Stork 1993) on structures as in ZipLM
    (arXiv:2302.04089), OSSCAR (arXiv:2403.12983) and LLM Surgeon (arXiv:2312.17244).
    """
    assert block.moments is not None and block.moments.gradients is not None  # noqa: S101
    # in this order, so that the memory of H is free again before A is allocated
    inverse = invert_(block.moments.ridged())
    gram = weighted_gram(block.weights[block.output], block.moments.gradients)
    order, cost = remove_within(inverse, gram, block.columns)
    return Curve(order, cost)


CRITERIA: dict[str, Criterion] = {
    "curvature": Criterion(curvature, moments=True, output_gradients=True),
    "taylor": Criterion(taylor, weight_gradients=True),
    "taylor_unit": Criterion(taylor_unit, weight_gradients=True),
    "taylor_signed": Criterion(taylor_signed, weight_gradients=True),
    "wanda": Criterion(wanda, moments=True),
    "flap": Criterion(flap, moments=True),
    "magnitude": Criterion(magnitude),
    "magnitude_l1": Criterion(magnitude_l1),
    "random": Criterion(random),
}
#: the default criterion
DEFAULT = "curvature"
