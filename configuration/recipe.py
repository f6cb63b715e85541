"""Recipes: YAML in, frozen dataclasses out, and back. A recipe says everything that `gqaprune run` does."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..errors import UsageError, unknown
from . import builtin
from .recovery import Settings

T = TypeVar("T")


@dataclass(frozen=True)
class CalibrationRecipe:
    """Text that the statistics are measured on (`split="train"` of named datasets).

    Attributes:
        data: dataset names, text files, or `datasets` ids; drawn from evenly.
        samples: windows in all.
        seq_len: tokens per window; `None`: `min(2048, max_position_embeddings)`.
    """

    data: tuple[str, ...] = ("wikitext2",)
    samples: int = 128
    seq_len: int | None = None


@dataclass(frozen=True)
class PruneRecipe:
    """How much is removed, and which units: exactly one of `ratio` (of all parameters), `backbone_ratio` and `rates`.

    See `make_plan` for the fields, and `gqaprune prune --help` for those of this stage: `compensation`, `memory` and
    `device`, which is measured on, too.
    """

    ratio: float | None = None
    backbone_ratio: float | None = None
    rates: tuple[float, ...] | None = None
    criterion: str = "curvature"
    allocation: str | None = None
    temperature: float | None = None
    attention_share: float | None = None
    min_kv_heads: int = 1
    min_ffn: int = 1
    keep_layers: tuple[int, ...] = ()
    round_to: int | None = None
    compensation: str | None = None
    memory: str | None = None
    device: str | None = None


@dataclass(frozen=True)
class RecoverRecipe:
    """Training after pruning (`split="train"` of named datasets); `recover: null` in a recipe leaves it out.

    Attributes:
        distill: the dense model is the teacher.
        settings: other fields of `trainer.presets.Settings`, which a recipe names beside these: `recover.rank`.
    """

    data: tuple[str, ...] = ("wikitext2",)
    preset: str = "default"
    max_tokens: int | None = None
    seq_len: int | None = None
    distill: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluateRecipe:
    """What is measured on the dense, the pruned and the recovered model alike (`split="test"` of named datasets)."""

    data: tuple[str, ...] = ("wikitext2",)
    seq_len: int | None = None
    stride: int | None = None
    max_chars: int | None = None
    drop_tail: bool = False
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True)
class CardRecipe:
    """What the model card cannot read from the files; `None`: the base model's."""

    name: str | None = None
    license: str | None = None


@dataclass(frozen=True)
class Recipe:
    """One run, from a dense checkpoint to a folder that can be pushed.

    Attributes:
        model: a local folder, a Hub id, or `demo` (the embedded model).
        output: folder that receives every stage's result.
        seed: of calibration windows, ties and recovery.
    """

    model: str
    output: str
    seed: int = 0
    calibration: CalibrationRecipe = field(default_factory=CalibrationRecipe)
    prune: PruneRecipe = field(default_factory=PruneRecipe)
    recover: RecoverRecipe | None = field(default_factory=RecoverRecipe)
    evaluate: EvaluateRecipe = field(default_factory=EvaluateRecipe)
    card: CardRecipe = field(default_factory=CardRecipe)

    @classmethod
    def load(cls, source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a YAML file or a built-in recipe, then apply `KEY=VALUE` overrides such as `prune.ratio=0.25`.

        Raises:
            UsageError: no such recipe, not YAML, not a mapping, an unknown or missing key, or a wrong type.
        """
        data = parse(read_source(source), str(source))
        for override in overrides:
            _override(data, override)
        return cls.from_dict(data, str(source))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "recipe") -> Recipe:
        """A recipe from nested mappings; `source` names the origin in error messages."""
        if isinstance(data.get("recover"), Mapping):
            data = {**data, "recover": _with_settings(data["recover"], source)}
        recipe = _build(cls, data, "", source)
        chosen = [name for name in _RATIOS if getattr(recipe.prune, name) is not None]
        if len(chosen) != 1:
            was = f"{' and '.join(chosen)} are set" if chosen else "none is set"
            raise UsageError(
                f"{source}: exactly one of prune.ratio (of all parameters), prune.backbone_ratio (of the decoder layers) and "
                f"prune.rates (one per layer) is needed, {was}: pass --set prune.ratio=0.2"
            )
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dicts and lists, in the order of the fields, defaults included."""
        data = _plain(asdict(self))
        if self.recover is not None:
            data["recover"] |= data["recover"].pop("settings")
        return data

    def to_yaml(self) -> str:
        """YAML that `Recipe.load` reads back to an equal recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def without_paths(self) -> Recipe:
        """This recipe as it may be published: local paths are reduced to the file or folder name."""
        recover = self.recover and replace(self.recover, data=_names(self.recover.data))
        return replace(
            self,
            model=_names((self.model,))[0],
            output=Path(self.output).name,
            calibration=replace(self.calibration, data=_names(self.calibration.data)),
            recover=recover,
            evaluate=replace(self.evaluate, data=_names(self.evaluate.data)),
        )


#: of these keys a recipe has one; setting one on the command line unsets the others
_RATIOS = ("ratio", "backbone_ratio", "rates")
#: whole numbers that may be less than 1
_LEAST = {"seed": -math.inf, "prune.min_kv_heads": 0, "prune.min_ffn": 0}


def builtin_names() -> tuple[str, ...]:
    """Names of the recipes in the package, sorted."""
    return tuple(builtin("recipes"))


def read_source(source: str | Path) -> str:
    """YAML text of a built-in recipe (by name) or of a file. Raises [`UsageError`] where there is neither."""
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
    """The mapping in `text`. Raises [`UsageError`] where it is not YAML or not a mapping."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"recipe {source} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UsageError(
            f"recipe {source} holds {_kind(data)}, not a mapping: start from one of `gqaprune recipes show NAME`"
        )
    return data


def description(name: str) -> str:
    """The first comment line of a built-in recipe."""
    return read_source(name).splitlines()[0].removeprefix("#").strip()


def assignment(override: str, example: str) -> tuple[str, Any]:
    """Key and value of one `--set KEY=VALUE`; the value is YAML. `example` is shown where it is not written like that."""
    key, separator, text = override.partition("=")
    key = key.strip()
    if not separator or not all(key.split(".")):
        raise UsageError(f"--set {override}: write it as KEY=VALUE, such as {example}")
    try:
        return key, yaml.safe_load(text)
    except yaml.YAMLError:
        raise UsageError(f"--set {override}: {text!r} is not a YAML value") from None


def _override(data: dict[str, Any], override: str) -> None:
    """Set one `section.key=value` in `data`."""
    path, value = assignment(override, "prune.ratio=0.25")
    keys = path.split(".")
    node = data
    for key in keys[:-1]:
        child = node.get(key)
        node[key] = node = dict(child) if isinstance(child, Mapping) else {}
    node[keys[-1]] = value
    if keys[:-1] == ["prune"] and keys[-1] in _RATIOS:
        node.update({name: None for name in _RATIOS if name != keys[-1]})


def _with_settings(recover: Mapping[str, Any], source: str) -> dict[str, Any]:
    """`recover` of a recipe with the keys that are fields of `Settings` put under `settings`."""
    own = [f.name for f in fields(RecoverRecipe) if f.name != "settings"]
    known = list(dict.fromkeys([*own, *(f.name for f in fields(Settings))]))
    for key in recover:
        if key not in known:
            raise unknown(f"key in recipe {source}:", f"recover.{key}", [f"recover.{name}" for name in known])
    settings = {key: value for key, value in recover.items() if key not in own}
    return {**{key: value for key, value in recover.items() if key in own}, "settings": settings}


def _build(kind: type[T], data: object, prefix: str, source: str) -> T:
    """An instance of the dataclass `kind` from `data`, every key and type checked."""
    if not isinstance(data, Mapping):
        raise UsageError(f"{source}: {prefix.rstrip('.')} must be a mapping, not {_kind(data)}")
    hints = typing.get_type_hints(kind)
    for key in data:
        if key not in hints:
            raise unknown(f"key in recipe {source}:", f"{prefix}{key}", [f"{prefix}{name}" for name in hints])
    values = {key: _value(hints[key], value, f"{prefix}{key}", source) for key, value in data.items()}
    try:
        return kind(**values)
    except TypeError:
        missing = [f.name for f in fields(kind) if f.name not in values and f.name in ("model", "output")]  # type: ignore[arg-type]
        raise UsageError(f"{source}: {missing[0]} is required: pass --set {missing[0]}=...") from None


def _value(hint: Any, value: object, key: str, source: str) -> Any:
    """`value` as the type `hint`, or [`UsageError`]."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    wanted = next(option for option in options if option is not type(None))
    if is_dataclass(wanted):
        return _build(wanted, value, f"{key}.", source)  # type: ignore[arg-type]
    if typing.get_origin(wanted) is tuple:
        item_type = typing.get_args(wanted)[0]
        items = value if isinstance(value, list) else [value]
        if item_type is float:
            numbers = [_number(item) for item in items]
            if None not in numbers:
                return tuple(numbers)
        elif all(isinstance(item, item_type) and not isinstance(item, bool) for item in items):
            return tuple(items)
    elif typing.get_origin(wanted) is dict:
        return value
    elif wanted is float:
        number = _number(value)
        if number is not None:
            return number
    elif wanted is int and isinstance(value, int) and value < (least := _LEAST.get(key, 1)):
        raise UsageError(f"{source}: {key} must be a whole number from {least}, not {value!r}")
    elif isinstance(value, wanted) and not (wanted is int and isinstance(value, bool)):
        return value
    raise UsageError(f"{source}: {key} must be {_WANTED[wanted]}, not {value!r}")


def _number(value: object) -> float | None:
    # YAML 1.1 reads 1e-4 as a string
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


_WANTED: dict[Any, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple[str, ...]: "a list of texts",
    tuple[int, ...]: "a list of whole numbers",
    tuple[float, ...]: "a list of numbers",
}


def _kind(value: object) -> str:
    names = {type(None): "nothing", list: "a list", str: "a text", bool: "true or false", dict: "a mapping"}
    return names.get(type(value), "a number")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _names(sources: Sequence[str]) -> tuple[str, ...]:
    return tuple(Path(source).resolve().name if Path(source).exists() else source for source in sources)
