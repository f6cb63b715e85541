"""How to run: recipes and accelerate configurations that come with the package, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def builtin(kind: Literal["recipes", "accelerate"]) -> dict[str, Path]:
    """List the packaged files of one kind, sorted by name: `{name: YAML file}`."""
    return {path.stem: path for path in sorted((Path(__file__).parent / kind).glob("*.yaml"))}
