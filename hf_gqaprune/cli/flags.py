"""Generate command-line flags from the fields of settings, and read them back."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import Field, fields
from typing import Any, get_args, get_origin

from ..configuration import Settings, choices, options_of


def add_flags(
    group: argparse._ActionsContainer, section: type[Settings], *, only: Iterable[str] = (), skip: Iterable[str] = ()
) -> None:
    """Add one flag per field of `section`, with its help, choices and default; a flag that is not given leaves no trace."""
    for spec in fields(section):
        if (not only or spec.name in only) and spec.name not in skip:
            group.add_argument(flag_of(spec), dest=spec.name, default=argparse.SUPPRESS, **_options(spec))


def given(args: argparse.Namespace, section: type[Settings]) -> dict[str, Any]:
    """Return the fields of `section` that were given on the command line."""
    return {name: getattr(args, name) for name in section.names() if hasattr(args, name)}


def flag_of(spec: Field[Any]) -> str:
    """Return the flag of a field."""
    return str(spec.metadata["flag"]) or f"--{spec.name.replace('_', '-')}"


def _options(spec: Field[Any]) -> dict[str, Any]:
    """Return what `add_argument` takes for a field."""
    kind = next(option for option in options_of(spec.type) if option is not type(None))
    text = _help(spec)
    if kind is bool:
        switch = "store_true" if spec.default is False else argparse.BooleanOptionalAction
        return {"action": switch, "help": text}
    options: dict[str, Any] = {"help": text, "metavar": spec.metadata["metavar"] or ("N" if kind is int else "X")}
    if get_origin(kind) is tuple:
        (item, _) = get_args(kind)
        if item is str and "," not in options["metavar"]:
            return {**options, "nargs": "+", "action": "extend"}
        return {**options, "type": _listed(_parser(item))}
    return {**options, "type": _parser(kind)}


def _help(spec: Field[Any]) -> str:
    text = str(spec.metadata["help"])
    if (options := choices(spec)) and not all(option in text for option in options):
        text += f": {', '.join(options)}"
    if spec.default not in (None, (), False) and "(default" not in text:
        default = spec.default if isinstance(spec.default, tuple) else (spec.default,)
        text += f" (default: {' '.join(map(str, default))})"
    return text.replace("%", "%%")


def _parser(kind: Any) -> Callable[[str], Any]:
    """Return what turns a word into a value; texts and choices are checked by the settings themselves."""
    names = {int: "a whole number", float: "a number"}
    if kind not in names:
        return str

    def parse(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {names[kind]}") from None

    return parse


def _listed(parse: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Return what reads values separated by commas."""

    def read(text: str) -> tuple[Any, ...]:
        try:
            return tuple(parse(part) for part in text.split(","))
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of values separated by commas: {error}") from None

    return read
