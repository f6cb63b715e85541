"""TODO."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from .identity import fingerprint, read_identity, write_identity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: what a checkpoint has besides config and weights, as far as it has it
CARRIED_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "additional_chat_templates/*.jinja"),
    *("generation_config.json", "recipe.yaml", "LICENSE*", "USE_POLICY*", "NOTICE*"),
)


def write_checkpoint(model: PreTrainedModel, base: str | os.PathLike[str], output: Path, **known: object) -> None:
    """Save `model` to `output` with everything of `base` that is not weights, and its own `gqaprune.json`.

    `known` goes into `gqaprune.json` beside the fingerprint, over what `base` says of itself there.
    """
    model.save_pretrained(output)
    for pattern in CARRIED_FILES:
        for path in Path(base).glob(pattern):
            target = output / path.relative_to(base)
            # what the model wrote about itself is newer
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    inherited = read_identity(base) or {}
    write_identity(output, **{**inherited, **known, "fingerprint": fingerprint(output)})
