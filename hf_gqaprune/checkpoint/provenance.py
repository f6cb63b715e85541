"""Tell which text a checkpoint was calibrated and trained on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .identity import read_identity

#: what `recover` writes beside the weights
LOG_FILE = "training_log.json"


def format_sources(sources: Iterable[Mapping[str, Any]]) -> str:
    """Format entries such as those of `Calibration.record()`: `books (train), wikitext2 (train)`."""
    return ", ".join(f"{source['name']} ({source['split']})" for source in sources)


def texts_used(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """List the texts that a checkpoint was calibrated or trained on, as its folder records: `name`, `split`, `sha256`."""
    return [*(read_identity(folder) or {}).get("calibration", []), *(read_training_log(folder) or {}).get("data", [])]


def read_training_log(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read the log of the recovery that made a checkpoint, None without one; raises [`UsageError`] if it is unreadable."""
    path = Path(folder) / LOG_FILE
    if not path.is_file():
        return None
    try:
        log = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from None
    if not isinstance(log, dict):
        raise UsageError(f"{path} holds no JSON object")
    return log


def refuse_overlap(used: Iterable[Mapping[str, Any]], measured: Iterable[Mapping[str, Any]]) -> None:
    """Raise [`UsageError`] where a text that was `used` (to calibrate or to train) is `measured` on too.

    Texts are mappings with `name`, `split` and `sha256`. They are the same if their content is, or if both are of one split
    of a dataset, where one may be a part of the other.
    """
    seen = list(used)
    for text in measured:
        for other in seen:
            # files of one name may be different texts; splits of one dataset are not
            named = text["split"] != "file" and all(text[key] == other[key] for key in ("name", "split"))
            if text["sha256"] == other["sha256"] or named:
                raise UsageError(
                    f"{text['name']} ({text['split']}) is evaluated on, but {other['name']} ({other['split']}) is the "
                    f"same text and was calibrated or trained on: name another text or split for one of them"
                )
