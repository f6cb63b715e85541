"""Save a model together with the files that belong to its checkpoint."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from .identity import fingerprint, read_identity, write_identity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: optional files of a checkpoint besides config and weights
CARRIED_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "additional_chat_templates/*.jinja"),
    *("generation_config.json", "recipe.yaml", "LICENSE*", "USE_POLICY*", "NOTICE*"),
)


def copy_carried_files(base: str | os.PathLike[str], output: Path, *patterns: str) -> None:
    """Copy tokenizer, generation config, licence and the like from `base`; files already in `output` are kept.

    `patterns` name further files.
    """
    for pattern in (*CARRIED_FILES, *patterns):
        for path in Path(base).glob(pattern):
            target = output / path.relative_to(base)
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


def write_checkpoint(model: PreTrainedModel, base: str | os.PathLike[str], output: Path, **metadata: object) -> None:
    """Save `model` to `output` with the other files of `base`, and its own `gqaprune.json`.

    `metadata` is written to `gqaprune.json` beside the fingerprint and replaces values inherited from `base`.
    """
    model.save_pretrained(output)
    copy_carried_files(base, output)
    inherited = read_identity(base) or {}
    write_identity(output, **{**inherited, **metadata, "fingerprint": fingerprint(output)})
