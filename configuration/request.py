"""Declare what the commands plan and prune are asked for."""

from typing import ClassVar

from ..errors import UsageError
from .measuring import CalibrationConfig
from .pruning import Compensation, PruningConfig
from .settings import Settings, seed, setting, settings


@settings
class PruneRequest(Settings):
    """What `plan` and `prune` are asked for: a model, what to remove, and what to measure on or to reuse."""

    kind: ClassVar[str] = "pruning setting"

    model: str = setting(help="a local folder, a Hub id, or demo")
    pruning: PruningConfig = setting(factory=PruningConfig)
    calibration: CalibrationConfig = setting(factory=CalibrationConfig)
    seed: int = setting(default=0, help="seed of the calibration windows and of ties", check=seed)
    plan: str | None = setting(default=None, help="a saved plan, instead of a budget", metavar="FILE")
    statistics: str | None = setting(default=None, help="saved statistics instead of a calibration pass", metavar="DIR")
    save_statistics: str | None = setting(default=None, help="keep what the calibration pass measured", metavar="DIR")

    def validate_budget(self) -> None:
        """Refuse a request that does not say what to remove, or says it twice."""
        if len(self.pruning.budgets) + (self.plan is not None) != 1:
            raise UsageError("give exactly one of --ratio, --backbone-ratio, --rates and, to prune, a saved --plan")

    @property
    def compensation(self) -> Compensation:
        """The compensation, whether it was named or not."""
        return self.pruning.resolved_compensation

    @property
    def streamed(self) -> bool:
        """Whether layers are read one by one: within a bound, or because a saved plan is only replayed."""
        return self.pruning.memory is not None or (self.plan is not None and self.compensation == "none")
