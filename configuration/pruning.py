"""Declare what to remove and how to make up for it."""

from typing import ClassVar, Literal

from ..errors import UsageError
from .settings import Dtype, Settings, at_least, between, fraction, setting, settings

Criterion = Literal[
    "curvature", "taylor", "taylor_unit", "taylor_signed", "wanda", "flap", "magnitude", "magnitude_l1", "random"
]
Allocation = Literal["global", "uniform", "query_heads", "search", "per_layer", "layer_importance"]
Compensation = Literal["natural_gradient", "least_squares", "bias", "none"]

DEFAULT_CRITERION: Criterion = "curvature"


def _rates(values: tuple[float, ...]) -> None:
    for value in values:
        if not 0 <= value < 1:
            raise ValueError(f"holds {value}: every rate must be at least 0 and below 1")


@settings
class PruningConfig(Settings):
    """How much to remove, from which units, and what to do to the weights that are left.

    A plan needs exactly one of `ratio`, `backbone_ratio` and `rates`.
    """

    kind: ClassVar[str] = "pruning setting"

    ratio: float | None = setting(default=None, help="fraction of all parameters to remove", check=fraction, metavar="R")
    backbone_ratio: float | None = setting(
        default=None,
        help="fraction of the decoder layers' parameters to remove, norms included",
        check=fraction,
        metavar="R",
    )
    rates: tuple[float, ...] | None = setting(
        default=None,
        help="fraction to remove from each layer, one per layer (allocation per_layer)",
        check=_rates,
        metavar="R,R,...",
    )
    criterion: Criterion | None = setting(
        default=None,
        help=f"how units are ranked (default: {DEFAULT_CRITERION}, or that of the saved statistics)",
        metavar="C",
    )
    allocation: Allocation | None = setting(
        default=None,
        help="how the budget is split over the layers (default: global, or per_layer with rates); query_heads may also remove "
        "the same number of query heads from every group of a layer, search starts from global and follows divergence",
        metavar="A",
    )
    temperature: float | None = setting(
        default=None,
        help="layer_importance: from 0.01 (the least important layers lose everything) over 1 (default) to equal rates",
        check=at_least(0.01),
        metavar="T",
    )
    attention_share: float | None = setting(
        default=None,
        help="global: fraction of the removed parameters that attention blocks give (default: by cost)",
        check=between(0, 1),
        metavar="S",
    )
    min_kv_heads: int = setting(
        default=1, help="KV groups that every block keeps; 0 allows whole blocks to be removed", check=at_least(0)
    )
    min_ffn: int = setting(
        default=1, help="FFN channels that every block keeps; 0 allows whole blocks to be removed", check=at_least(0)
    )
    keep_layers: tuple[int, ...] = setting(
        default=(), help="layers that stay untouched, counted from 0, or from the end with -1", metavar="I,I,..."
    )
    round_to: int | None = setting(default=None, help="make FFN widths multiples of this many channels", check=at_least(1))
    compensation: Compensation | None = setting(
        default=None,
        help="how the remaining weights are refitted: natural_gradient (default), least_squares (closed form only, a fraction "
        "of the time; default with memory), bias (the mean of what was removed, as biases that count) or none",
        metavar="C",
    )
    memory: str | None = setting(
        default=None,
        help="bound on the memory of the GPU, or of the process where none is used, such as 8GiB: the model is read layer by "
        "layer and activations wait on disk, or beside a GPU in the memory of the host",
        metavar="SIZE",
    )
    device: str | None = setting(
        default=None, help="cpu, cuda, cuda:N, or auto for all GPUs (default: the first GPU, if any)", metavar="D"
    )

    dtype: Dtype | None = setting(
        default=None, help="dtype to compute in (default: as stored, or float32 where that is faster)", metavar="T"
    )

    def validate_budget(self) -> None:
        """Refuse two budgets, and rates without the allocation that reads them."""
        if len(self.budgets) > 1:
            raise UsageError(f"give exactly one of ratio, backbone_ratio and rates, not {' and '.join(self.budgets)}")
        if (self.method == "per_layer") != (self.rates is not None):
            raise UsageError(
                "allocation='per_layer' requires rates, one per layer, and rates require allocation='per_layer'"
            )
        if self.rates is not None and (self.keep_layers or self.round_to is not None):
            raise UsageError("keep_layers and round_to do not combine with rates: rate 0 keeps a layer")

    def validate_method(self) -> None:
        """Refuse settings of another allocation."""
        for name, method in (("temperature", "layer_importance"), ("attention_share", "global")):
            if getattr(self, name) is not None and self.method != method:
                raise UsageError(f"{name} is a setting of allocation {method}, not of {self.method}: leave one out")

    @property
    def budgets(self) -> list[str]:
        """Names of the budgets that are given."""
        return [name for name in BUDGETS if getattr(self, name) is not None]

    @property
    def method(self) -> str:
        """Name of the allocation."""
        return self.allocation or ("per_layer" if self.rates is not None else "global")

    @property
    def resolved_compensation(self) -> Compensation:
        """The compensation, named or not; with a bound on memory the best that does not need the whole model."""
        return self.compensation or ("least_squares" if self.memory else "natural_gradient")

    @property
    def adds_biases(self) -> bool:
        """Whether every linear of the pruned model gets a bias, which counts as parameters."""
        return self.compensation == "bias"


#: exactly one of these says how much to remove
BUDGETS = ("ratio", "backbone_ratio", "rates")
