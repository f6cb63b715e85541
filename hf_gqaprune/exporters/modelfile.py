"""Describe a GGUF file to ollama."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

#: tokens of context that ollama reserves memory for unless it is told
_CONTEXT = 4096


def modelfile(name: str, tokenizer: Mapping[str, Any], context: int) -> str:
    """Write the text of a Modelfile for the GGUF file `name` in the same folder.

    ollama recognizes the chat templates of known models in the file; without one the prompt goes to the model as it is.
    """
    from gguf import Keys

    tokens = tokenizer[Keys.Tokenizer.LIST]
    stops = dict.fromkeys(
        tokens[tokenizer[key]]
        for key in (Keys.Tokenizer.EOS_ID, Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID)
        if key in tokenizer
    )
    lines = [f"FROM ./{name}", f"PARAMETER num_ctx {min(context, _CONTEXT)}"]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    if Keys.Tokenizer.CHAT_TEMPLATE not in tokenizer:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    return "\n".join(lines) + "\n"
