"""Weights go in, a fingerprint comes out; `gqaprune.json` keeps it beside a checkpoint or an adapter."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .errors import UsageError
from .files import write_json

FILE = "gqaprune.json"
VERSION = 1


def fingerprint(folder: str | os.PathLike[str]) -> str:
    """Hash of the weights in a checkpoint folder: names, dtypes, shapes and bytes, however they are sharded.

    Returns:
        32 hex digits (XXH3, 128 bits).

    Raises:
        UsageError: the folder holds no safetensors weights.
    """
    import torch
    import xxhash
    from safetensors import safe_open

    shards = sorted(Path(folder).glob("*.safetensors"))
    if not shards:
        raise UsageError(f"{folder} holds no safetensors weights to identify")
    digests = {}
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                tensor = file.get_tensor(name).contiguous()
                digest = xxhash.xxh3_128(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.view(-1).view(torch.uint8).numpy())
                digests[name] = digest.hexdigest()
    return xxhash.xxh3_128(json.dumps(sorted(digests.items())).encode()).hexdigest()


def write(folder: str | os.PathLike[str], **values: Any) -> None:
    """Write `gqaprune.json`: `values` such as `fingerprint`, `plan_hash`, `base_fingerprint`."""
    write_json(Path(folder) / FILE, {"version": VERSION, **values})


def read(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """`gqaprune.json` in `folder` but for its version, None where there is none; [`UsageError`] where it is unreadable."""
    path = Path(folder) / FILE
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(f"{path} is not readable: {error}") from error
    if not isinstance(data, dict) or data.pop("version", None) != VERSION:
        raise UsageError(f"{path} is not of version {VERSION}")
    return data
