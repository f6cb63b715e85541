"""Find which repository a card of our template loads from, and the command that changes it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .licenses import UNKNOWN

#: the two lines under "How to load", which only our template writes
_LINES = re.compile(
    r'^model = Auto\w+\.from_pretrained\("([^"\n]+)"\)\ntokenizer = AutoTokenizer\.from_pretrained\("\1"\)$', re.MULTILINE
)


def loads_from(text: str) -> str | None:
    """Return the id or name that a card of our template loads model and tokenizer from; None for any other card."""
    found = _LINES.search(text)
    return found and found[1]


def names_repository(name: str, repo_id: str) -> bool:
    """Return whether `name`, which a card loads, is `repo_id`, which may be given without its first half."""
    return name == repo_id if "/" in repo_id else name.count("/") == 1 and name.endswith(f"/{repo_id}")


def card_command(folder: str | Path, base_model: str | None, name: str, license: str | None = None) -> str:
    """Return the command that rewrites the card of `folder` so that it loads from `name`."""
    words = ["gqaprune", "card", str(folder), "--base-model", base_model or "ID", "--name", name, "--overwrite"]
    return shlex.join([*words, *(["--license", license] if license else [])])


def renaming_command(folder: Path, metadata: Mapping[str, Any], repo_id: str) -> str:
    """Return the `card_command` for repository `repo_id`, with base model and licence from the card's metadata."""
    base = metadata.get("base_model")
    license = metadata.get("license", UNKNOWN)
    # a custom licence was looked up in the base model and will be again
    known = license != UNKNOWN and "license_name" not in metadata
    name = repo_id if "/" in repo_id else f"ORG/{repo_id}"
    return card_command(folder, base if isinstance(base, str) else None, name, license if known else None)
