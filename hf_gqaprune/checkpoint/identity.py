"""Identify weights by a fingerprint, and keep it in `gqaprune.json` beside a checkpoint or an adapter."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from ..utils import write_json

IDENTITY_FILE = "gqaprune.json"
VERSION = 1


def fingerprint(folder: str | os.PathLike[str]) -> str:
    """Hash the weights in a checkpoint folder: names, dtypes, shapes and bytes, however they are sharded.

    Returns:
        32 hex digits (XXH3, 128 bits).

    Raises:
        UsageError: the folder holds no safetensors weights.
    """
    from safetensors import safe_open

    shards = sorted(Path(folder).glob("*.safetensors"))
    if not shards:
        raise UsageError(f"{folder} holds no safetensors weights to identify")
    digests = {}
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                tensor = file.get_tensor(name)
                digests[name] = digest(tensor.dtype, tuple(tensor.shape), [tensor])
    return fingerprint_of_digests(digests)


def write_identity(folder: str | os.PathLike[str], **values: Any) -> None:
    """Write `gqaprune.json` with `values` such as `fingerprint`, `plan_hash`, `base_fingerprint`."""
    write_json(Path(folder) / IDENTITY_FILE, {"version": VERSION, **values})


def read_identity(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read `gqaprune.json` without its version; None if there is none. Raises [`UsageError`] if it is unreadable."""
    path = Path(folder) / IDENTITY_FILE
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(f"{path} is not readable: {error}") from error
    if not isinstance(data, dict) or data.pop("version", None) != VERSION:
        raise UsageError(f"{path} is not of version {VERSION}")
    return data


def digest(dtype: torch.dtype, shape: tuple[int, ...], pieces: Iterable[torch.Tensor]) -> str:
    """Hash dtype, shape and bytes of a tensor that comes in `pieces`: XXH3 (128 bits) as hex."""
    hashed = Digest(dtype, shape)
    for piece in pieces:
        hashed.update(piece)
    return hashed.hex()


def fingerprint_of_digests(digests: Mapping[str, str]) -> str:
    """Combine the digests of all tensors, `{name: hex}`, to the fingerprint of their folder."""
    import xxhash

    return xxhash.xxh3_128(json.dumps(sorted(digests.items())).encode()).hexdigest()


class Digest:
    """A [`digest`] that is fed piece by piece."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        import xxhash

        self._hash = xxhash.xxh3_128(f"{dtype} {shape}".encode())

    def update(self, piece: torch.Tensor) -> None:
        """Add the next piece, of any memory layout."""
        self._hash.update(memory_of(piece.contiguous()))

    def hex(self) -> str:
        """Return the hex digest of the data so far."""
        return self._hash.hexdigest()


def memory_of(tensor: torch.Tensor) -> memoryview:
    """View the bytes of a contiguous CPU tensor."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data
