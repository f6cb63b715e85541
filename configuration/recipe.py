"""Declare a recipe, everything that `gqaprune run` does, and read and write it as YAML."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml

from ..errors import UsageError, on_one_line, unknown
from .files import builtin
from .measuring import CalibrationConfig, EvaluationConfig
from .pruning import BUDGETS, PruningConfig
from .recovery import RecoveryConfig
from .settings import Settings, seed, setting, settings

#: teacher of a recovery that distils from the recipe's own model
DENSE = "dense"


@settings
class CardConfig(Settings):
    """What the model card cannot read from the files."""

    kind: ClassVar[str] = "card setting"

    name: str | None = setting(
        default=None, help="where it will be on the Hub (default: the folder's name)", metavar="ORG/NAME"
    )
    license: str | None = setting(default=None, help="licence (default: the base model's)", metavar="L")


@settings
class Recipe(Settings):
    """One run, from a dense checkpoint to a folder that can be pushed."""

    kind: ClassVar[str] = "recipe key"

    model: str = setting(help="a local folder, a Hub id, or demo (the embedded model)")
    output: str = setting(help="folder that receives every stage's result")
    seed: int = setting(default=0, help="seed of calibration windows, ties and recovery", check=seed)
    calibration: CalibrationConfig = setting(factory=CalibrationConfig)
    prune: PruningConfig = setting(factory=PruningConfig)
    recover: RecoveryConfig | None = setting(factory=RecoveryConfig.from_preset)
    evaluate: EvaluationConfig = setting(factory=EvaluationConfig)
    card: CardConfig = setting(factory=CardConfig)

    def validate_budget(self) -> None:
        """Refuse a recipe that does not say how much to remove."""
        if not self.prune.budgets:
            raise UsageError(
                "exactly one of prune.ratio (of all parameters), prune.backbone_ratio (of the decoder layers) and prune.rates "
                "(one per layer) is needed, none is set: pass --set prune.ratio=0.2"
            )

    @classmethod
    def load(cls, source: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file or a built-in recipe, then apply `KEY=VALUE` overrides such as `prune.ratio=0.25`.

        Raises:
            UsageError: no such recipe, not YAML, not a mapping, an unknown or missing key, or a wrong type.
        """
        data = parse(read_source(source), str(source))
        for override in overrides:
            _override(data, override)
        return cls.from_dict(data, str(source))

    def to_yaml(self) -> str:
        """Return YAML that `Recipe.load` reads back to an equal recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def without_paths(self) -> Self:
        """Return this recipe as it may be published: local paths are reduced to the name of the file or folder."""
        teacher = self.recover and self.recover.teacher
        recover = self.recover and replace(
            self.recover, data=_names(self.recover.data), teacher=_names((teacher,))[0] if teacher else None
        )
        return replace(
            self,
            model=_names((self.model,))[0],
            output=Path(self.output).name,
            calibration=replace(self.calibration, data=_names(self.calibration.data)),
            recover=recover,
            evaluate=replace(self.evaluate, data=_names(self.evaluate.data)),
        )


def builtin_names() -> tuple[str, ...]:
    """List the recipes in the package, sorted."""
    return tuple(builtin("recipes"))


def read_source(source: str | Path) -> str:
    """Read the YAML of a built-in recipe, by name, or of a file. Raises [`UsageError`] where there is neither."""
    path = builtin("recipes").get(str(source), Path(source))
    if not path.is_file():
        if path.suffix in (".yaml", ".yml"):
            raise UsageError(f"no recipe file {source}: give a YAML file or one of {', '.join(builtin_names())}")
        raise unknown("recipe", str(source), builtin_names())
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"recipe {source} is not UTF-8 text: give a YAML file") from None


def parse(text: str, source: str) -> dict[str, Any]:
    """Read the mapping in `text`. Raises [`UsageError`] where it is not YAML or not a mapping."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"recipe {source} is not YAML: {on_one_line(error)}") from None
    if not isinstance(data, dict):
        raise UsageError(f"recipe {source} is not a mapping: start from one of `gqaprune recipes show NAME`")
    return data


def description(name: str) -> str:
    """Return the first comment line of a built-in recipe."""
    return read_source(name).splitlines()[0].removeprefix("#").strip()


def _override(data: dict[str, Any], override: str) -> None:
    """Set one `section.key=value` in `data`; the value is YAML."""
    path, separator, text = override.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise UsageError(f"--set {override}: write it as KEY=VALUE, such as prune.ratio=0.25")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UsageError(f"--set {override}: {text!r} is not a YAML value") from None
    node = data
    for key in keys[:-1]:
        child = node.get(key)
        node[key] = node = dict(child) if isinstance(child, Mapping) else {}
    node[keys[-1]] = value
    if keys[:-1] == ["prune"] and keys[-1] in BUDGETS:
        # a budget on the command line replaces the recipe's
        node.update({name: None for name in BUDGETS if name != keys[-1]})


def _names(sources: Sequence[str]) -> tuple[str, ...]:
    return tuple(Path(source).resolve().name if Path(source).exists() else source for source in sources)
