"""A checkpoint folder goes in; what text its weights have seen, and how they were pruned and trained, comes out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import identity
from .errors import UsageError

if TYPE_CHECKING:
    from .preparation import Prepared

#: what `recover` writes beside the weights
LOG_FILE = "training_log.json"


def record(prepared: Prepared) -> dict[str, Any]:
    """For `gqaprune.json` of what a request prunes: which text was calibrated on, the seed and the compensation.

    What was calibrated on before, where the model was pruned already, stays.
    """
    earlier = (identity.read(prepared.folder) or {}).get("calibration", [])
    calibration = [*earlier, *(source for source in calibrated_on(prepared) if source not in earlier)]
    return {"calibration": calibration, "seed": prepared.request.seed, "compensation": prepared.request.fitting}


def calibrated_on(prepared: Prepared) -> list[dict[str, Any]]:
    """`Calibration.record()` of all text that a request reads, or that its saved statistics were measured on."""
    measured = prepared.statistics.calibration if prepared.statistics else None
    return [source for windows in (measured, prepared.calibration) if windows for source in windows.record()]


def named(sources: Iterable[Mapping[str, Any]]) -> str:
    """`books (train), wikitext2 (train)` of entries such as `Calibration.record()` has."""
    return ", ".join(f"{source['name']} ({source['split']})" for source in sources)


def seen(folder: Path) -> list[dict[str, Any]]:
    """Every text that a checkpoint was calibrated or trained on, as far as its folder tells: `name`, `split`, `sha256`."""
    return [*(identity.read(folder) or {}).get("calibration", []), *(training(folder) or {}).get("data", [])]


def training(folder: Path) -> dict[str, Any] | None:
    """The log of the recovery that made a checkpoint, None without one; [`UsageError`] where it is unreadable."""
    path = folder / LOG_FILE
    if not path.is_file():
        return None
    try:
        log = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from None
    if not isinstance(log, dict):
        raise UsageError(f"{path} holds no JSON object")
    return log
