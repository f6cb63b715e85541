"""Declare settings: frozen dataclasses whose fields carry their own help and checks."""

import math
import os
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from functools import wraps
from typing import Any, ClassVar, Literal, Self, TypeVar, Union, dataclass_transform, get_args, get_origin

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from ..errors import UsageError, unknown

#: dtypes that a model can be computed in
Dtype = Literal["float32", "bfloat16", "float16"]

C = TypeVar("C")
Check = Callable[[Any], None]


def setting(
    *,
    default: Any = MISSING,
    factory: Any = MISSING,
    help: str = "",
    check: Check | None = None,
    metavar: str = "",
    flag: str = "",
) -> Any:
    """Declare one field.

    Args:
        default: its value where nothing else is given.
        factory: makes the default, for a nested section.
        help: one clause for `--help` and the documentation.
        check: raises `ValueError("must be ...")` for a value that makes no sense; None passes unchecked.
        metavar: what `--help` shows for the value.
        flag: the command-line flag, where it is not the name with hyphens.
    """
    metadata = {"help": help, "metavar": metavar, "flag": flag, "validator": [check] if check else []}
    return field(default=default, default_factory=factory, metadata=metadata)


@dataclass_transform(frozen_default=True, field_specifiers=(setting,))
def settings(cls: type[C]) -> type[C]:
    """Make `cls`, a subclass of [`Settings`], a frozen dataclass that raises [`UsageError`] for what makes no sense."""
    made: Any = strict(dataclass(frozen=True)(cls))
    init = made.__init__

    @wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in made.names():
                raise unknown(made.kind, name, made.names())
        try:
            init(self, *args, **kwargs)
        except StrictDataclassError as error:
            # huggingface_hub wraps what a validate_ method raises
            raise UsageError(str(error.__cause__)) from None

    made.__init__ = __init__
    return made  # type: ignore[no-any-return]


class Settings:
    """What all sections of settings share; methods named `validate_...` check fields against each other."""

    #: what messages call a field
    kind: ClassVar[str] = "setting"
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    __validators__: ClassVar[dict[str, list[Check]]]

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = _coerced(getattr(self, spec.name), spec.type)
            object.__setattr__(self, spec.name, value)
            if problem := self.problem(spec.name, value):
                raise UsageError(problem)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """List the fields."""
        return tuple(spec.name for spec in fields(cls))

    @classmethod
    def problem(cls, name: str, value: Any, prefix: str = "") -> str | None:
        """Say in one line what is wrong with `value` for the field `name`, or return None."""
        spec = cls.__dataclass_fields__[name]
        of_type, *checks = cls.__validators__[name]
        try:
            of_type(value)
        except TypeError:
            options = choices(spec)
            if options and isinstance(value, str):
                return str(unknown(name, value, options))
            return f"{prefix}{name}={value!r} must be {_described(spec.type)}"
        try:
            for check in checks if value is not None else ():
                check(value)
        except ValueError as error:
            return f"{prefix}{name}={value!r} {error}"
        return None

    @classmethod
    def from_dict(cls, data: object, source: str = "", prefix: str = "") -> Self:
        """Build the settings from plain values as YAML gives them; fields that are not named keep their defaults.

        Args:
            data: mapping of field names to values; sections are mappings themselves.
            source: where the values come from, for messages.
            prefix: path of the section, such as `prune.`.

        Raises:
            UsageError: not a mapping, an unknown or missing field, or a value that makes no sense.
        """
        where = f"{source}: " if source else ""
        if not isinstance(data, Mapping):
            raise UsageError(f"{where}{prefix.rstrip('.')} must be a mapping, not {_kind(data)}")
        values: dict[str, Any] = {}
        for name, value in data.items():
            if name not in cls.names():
                known = [f"{prefix}{known}" for known in cls.names()]
                raise unknown(f"key in recipe {source}:" if source else cls.kind, f"{prefix}{name}", known)
            values[name] = cls._read(name, value, source, prefix)
        for spec in fields(cls):
            if spec.name not in values and spec.default is MISSING and spec.default_factory is MISSING:
                raise UsageError(f"{where}{prefix}{spec.name} is required: pass --set {prefix}{spec.name}=...")
        try:
            return cls._made(values)
        except UsageError as error:
            raise UsageError(f"{where}{error}") from None

    @classmethod
    def _made(cls, values: dict[str, Any]) -> Self:
        return cls(**values)

    @classmethod
    def _read(cls, name: str, value: Any, source: str, prefix: str) -> Any:
        hint = cls.__dataclass_fields__[name].type
        section = next((option for option in options_of(hint) if _is_section(option)), None)
        if section is not None:
            optional = value is None and type(None) in options_of(hint)
            return None if optional else section.from_dict(value, source, f"{prefix}{name}.")
        value = _coerced(_numbers(value, hint), hint)
        if problem := cls.problem(name, value, prefix):
            raise UsageError(f"{source}: {problem}" if source else problem)
        return value

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts and lists in the order of the fields, defaults included."""
        return _plain(asdict(self))  # type: ignore[no-any-return]


def choices(spec: Field[Any]) -> tuple[str, ...]:
    """List the values that a field with a `Literal` type takes."""
    literal = next((option for option in options_of(spec.type) if get_origin(option) is Literal), None)
    return get_args(literal)


def options_of(hint: Any) -> tuple[Any, ...]:
    """List the members of a union, or the type alone."""
    return get_args(hint) if isinstance(hint, types.UnionType) or get_origin(hint) is Union else (hint,)


# --- checks of single values


def fraction(value: float) -> None:
    """Check for a number strictly between 0 and 1."""
    if not 0 < value < 1:
        raise ValueError("must be a number between 0 and 1, such as 0.2")


def at_least(least: float) -> Check:
    """Make a check for finite numbers from `least` on."""

    def check(value: float) -> None:
        if not least <= value < math.inf:
            raise ValueError(f"must be a {'whole number' if isinstance(value, int) else 'number'} from {least}")

    return check


def between(low: float, high: float) -> Check:
    """Make a check for numbers from `low` to `high`."""

    def check(value: float) -> None:
        if not low <= value <= high:
            raise ValueError(f"must be a number from {low} to {high}")

    return check


def positive(value: float) -> None:
    """Check for a positive, finite number."""
    if not 0 < value < math.inf:
        raise ValueError("must be positive and finite")


def seed(value: int) -> None:
    """Check for a seed that numpy takes, which transformers seeds too."""
    if not 0 <= value < 2**32:
        raise ValueError(f"must be a whole number from 0 to {2**32 - 1}")


# --- types


def _is_section(option: Any) -> bool:
    return isinstance(option, type) and issubclass(option, Settings)


def _coerced(value: Any, hint: Any) -> Any:
    """Turn whole numbers into floats, paths into texts and lists or single items into tuples where the type says so."""
    for option in options_of(hint):
        if option is str and isinstance(value, os.PathLike):
            return os.fspath(value)
        if option is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if get_origin(option) is tuple and value is not None:
            items = value if isinstance(value, list | tuple) else (value,)
            return tuple(_coerced(item, get_args(option)[0]) for item in items)
    return value


def _numbers(value: Any, hint: Any) -> Any:
    """Turn texts into numbers where only a number is possible: YAML 1.1 reads 1e-4 as a text."""
    for option in options_of(hint):
        if get_origin(option) is tuple and isinstance(value, list | tuple):
            return [_numbers(item, get_args(option)[0]) for item in value]
        if option is float and isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                return value
    return value


_NAMES: dict[Any, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple[str, ...]: "a list of texts",
    tuple[int, ...]: "a list of whole numbers",
    tuple[float, ...]: "a list of numbers",
}


def _described(hint: Any) -> str:
    return " or ".join(_NAMES[option] for option in options_of(hint) if option in _NAMES)


def _kind(value: object) -> str:
    names = {type(None): "nothing", list: "a list", str: "a text", bool: "true or false", dict: "a mapping"}
    return names.get(type(value), "a number")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
