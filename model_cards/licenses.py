"""Read the licence of a base model and its terms for derived models."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HTTPError

from ..errors import UsageError

#: metadata that derived models inherit from the base model's card
INHERITED = ("license", "license_name", "license_link", "language")
UNKNOWN = "unknown"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILE_MARKS = (
    (re.compile(r"\bLLAMA\s+(\d(?:\.\d)?)\s+COMMUNITY\s+LICENSE\s+AGREEMENT", re.IGNORECASE), r"llama\1"),
    (re.compile(r"Apache License\s+Version 2\.0"), "apache-2.0"),
    (re.compile(r"\AMIT License"), "mit"),
)


@dataclass(frozen=True)
class LlamaTerms:
    """Terms for redistributing a model derived from a Llama (section 1.b of the community licences).

    Attributes:
        title: name of the licence.
        name_pattern: regular expression that the name of the derived model matches from its first letter.
        name_rule: the same rule in words.
        built_with: text to display prominently; None if not required.
        notice: attribution for the file `NOTICE`.
    """

    title: str
    name_pattern: str
    name_rule: str
    built_with: str | None
    notice: str

    def objection(self, name: str) -> str | None:
        """Return the objection to `ORG/NAME`, or to a bare name, for a derived model; None if it is allowed."""
        bare = name.rpartition("/")[2]
        return None if re.match(self.name_pattern, bare) else f"the name {bare!r} must {self.name_rule}"


def _terms(version: str) -> LlamaTerms:
    return LlamaTerms(
        title=f"Llama {version} Community License",
        name_pattern=r"Llama",
        name_rule="begin with 'Llama'",
        built_with="Built with Llama",
        notice=f"Llama {version} is licensed under the Llama {version} Community License, "
        "Copyright © Meta Platforms, Inc. All Rights Reserved.",
    )


LLAMA: Mapping[str, LlamaTerms] = {
    "llama2": LlamaTerms(
        title="Llama 2 Community License",
        name_pattern=r".*Llama",
        name_rule="contain 'Llama'",
        built_with=None,
        notice="Llama 2 is licensed under the LLAMA 2 Community License, "
        "Copyright (c) Meta Platforms, Inc. All Rights Reserved.",
    ),
    "llama3": LlamaTerms(
        title="Meta Llama 3 Community License",
        name_pattern=r"Llama[-_.]?3",
        name_rule="begin with 'Llama-3'",
        built_with="Built with Meta Llama 3",
        notice="Meta Llama 3 is licensed under the Meta Llama 3 Community License, "
        "Copyright © Meta Platforms, Inc. All Rights Reserved.",
    ),
    **{f"llama{version}": _terms(version) for version in ("3.1", "3.2", "3.3", "4")},
}


def llama_terms(metadata: Mapping[str, Any]) -> LlamaTerms | None:
    """Return the terms for a card's `license`, or for its `license_name` if that is `other`; None for other licences."""
    named = (str(metadata.get(key) or "").lower().replace("-", "") for key in ("license", "license_name"))
    return next((LLAMA[name] for name in named if name in LLAMA), None)


def derived_name(base_model: str) -> str:
    """Return a bare name for a model pruned from `base_model` that satisfies a Llama licence."""
    return f"{Path(base_model).name.removeprefix('Meta-')}-pruned"


def is_hub_id(model: str | os.PathLike[str]) -> bool:
    """Return whether `model` is a repository id `ORG/NAME` and not a local folder."""
    return _HUB_ID.fullmatch(str(model)) is not None and not Path(model).exists()


def inherited(base_model: str | os.PathLike[str]) -> dict[str, Any]:
    """Return `license` and related metadata from the base model's card, else from the text of its licence file.

    A Hub id is looked up on the Hub. Without a statement, or offline, `license` is `"unknown"`.
    """
    folder = Path(base_model)
    stated: Mapping[str, Any] = {}
    if folder.is_dir():
        stated = {"license": license_of_text(folder), **card_metadata(folder)}
    elif is_hub_id(base_model):
        stated = _hub_metadata(str(base_model))
    return {"license": UNKNOWN, **{key: stated[key] for key in INHERITED if stated.get(key) is not None}}


def check_name(name: str, base_model: str | os.PathLike[str], license: str | None = None) -> None:
    """Raise [`UsageError`] if `license` (None: the base model's) does not allow `name` for a derived model."""
    terms = llama_terms({"license": license} if license is not None else inherited(base_model))
    if terms and (objection := terms.objection(name)):
        raise UsageError(f"{terms.title}: {objection}")


def license_of_text(folder: Path) -> str | None:
    """Return the id of the licence whose text is in `folder` as `LICENSE*`; None without one or for another licence."""
    for path in sorted(folder.glob("LICENSE*")):
        head = path.read_text(encoding="utf-8", errors="replace")[:4096]
        for pattern, identifier in _FILE_MARKS:
            if match := pattern.search(head):
                return match.expand(identifier)
    return None


def card_metadata(folder: Path) -> dict[str, Any]:
    """Return the metadata of the card in `folder`, `{}` without a card; raise [`UsageError`] if it is not YAML."""
    if not (folder / "README.md").is_file():
        return {}
    try:
        metadata: dict[str, Any] = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.to_dict()
        return metadata
    except ValueError as error:
        raise UsageError(f"the metadata of {folder / 'README.md'} cannot be read: {error}") from None


def _hub_metadata(repo_id: str) -> dict[str, Any]:
    try:
        data = HfApi().model_info(repo_id, timeout=10).card_data
    except (HTTPError, OSError, ValueError):  # no such model, no connection, or an unreadable card
        return {}
    return data.to_dict() if data is not None else {}
