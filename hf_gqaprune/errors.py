"""What a user did wrong, told in one line: exceptions in, exit codes out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """The request makes no sense. Raised before any work; the command line exits 2 with the message alone."""


class WorkError(RuntimeError):
    """Something failed while working. What was finished is kept and named; the command line exits 1."""


def unknown(kind: str, value: object, allowed: Iterable[str]) -> UsageError:
    """Make the `UsageError` for a `value` outside `allowed`, with the nearest match first.

    >>> str(unknown("criterion", "tailor", ["taylor", "wanda"]))
    "unknown criterion 'tailor' (did you mean 'taylor'?); allowed: taylor, wanda"
    """
    names = [str(name) for name in allowed]
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return UsageError(f"unknown {kind} {value!r}{hint}; allowed: {', '.join(names)}")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def on_one_line(error: BaseException) -> str:
    """Return an error's whole message with its line breaks and runs of blanks replaced by single blanks."""
    return " ".join(str(error).split())
