"""Read the tensors of a checkpoint by offset, whole or in pieces, and hash them on the way.

Files are never mapped, so that only the requested bytes are in memory, and a fingerprint needs no second pass.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from huggingface_hub.constants import SAFETENSORS_INDEX_FILE as INDEX
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE as WEIGHTS

from ..errors import UsageError, WorkError
from .identity import Digest, digest, memory_of

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_LONGEST_HEADER = 100_000_000  # what safetensors itself accepts
_CHUNK = 1 << 22  # bytes of a piece of a tensor: caches hold it, and the allocator gives the same pages again


@dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor in its file.

    Attributes:
        file: the safetensors file.
        start: offset of its first byte in `file`; `nbytes` follow.
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint:
    """Reader of the tensors in a checkpoint folder; a context manager that opens every shard once.

    Attributes:
        tensors: `{name: StoredTensor}` of all shards.
        files: the shards.
        digests: `{name: hex}` of the tensors that were read completely; see `fingerprint`.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Check names, headers and sizes of all shards in `folder` without reading a weight.

        Raises:
            UsageError: no safetensors weights, a corrupt index or header, a shard that is missing or differs in size from
                its header, a tensor that is not where the index says, or is in two shards.
        """
        root = Path(folder)
        listed = _listed(root)
        self.files = tuple(root / name for name in sorted(set(listed.values()))) if listed else (root / WEIGHTS,)
        self.tensors: dict[str, StoredTensor] = {}
        for file in self.files:
            for tensor in read_header(file):
                if tensor.name in self.tensors:
                    raise UsageError(f"{tensor.name} is in two shards, {self.tensors[tensor.name].file} and {file.name}")
                self.tensors[tensor.name] = tensor
        for name, file_name in listed.items():
            if name not in self.tensors or self.tensors[name].file.name != file_name:
                raise UsageError(f"{root / INDEX} says that {name} is in {file_name}, which does not hold it")
        for name, tensor in self.tensors.items():
            if listed and name not in listed:
                raise UsageError(f"{root / INDEX} does not list {name}, which is in {tensor.file.name}")
        self.digests: dict[str, str] = {}
        self._open: dict[Path, int] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Checkpoint:
        with ExitStack() as stack:
            for file in self.files:
                try:
                    self._open[file] = os.open(file, os.O_RDONLY)
                except OSError as error:
                    raise WorkError(f"cannot read {file}: {error.strerror}") from error
                stack.callback(os.close, self._open[file])
            self._reader = stack.enter_context(ThreadPoolExecutor(1))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def read(self, name: str, *, pinned: bool = False) -> torch.Tensor:
        """Read the tensor `name` to the CPU, into `pinned` memory for a copy to a GPU; raises [`WorkError`] on failure."""
        stored = self.tensors[name]
        tensor = torch.empty(stored.shape, dtype=stored.dtype, pin_memory=pinned)
        _read(self._open[stored.file], stored, memory_of(tensor), stored.start)
        self.digests[name] = digest(stored.dtype, stored.shape, [tensor])
        return tensor

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        """Read the tensor `name` in pieces of whole rows, 4 MiB or one row; raises [`WorkError`] as `read`.

        A thread reads and hashes the next piece while the current one is used.
        """
        stored = self.tensors[name]
        hashed, pieces = Digest(stored.dtype, stored.shape), pieces_of(self._open[stored.file], stored)

        def following() -> torch.Tensor | None:
            piece = next(pieces, None)
            if piece is not None:
                hashed.update(piece)
            return piece

        coming = self._reader.submit(following)
        while (piece := coming.result()) is not None:
            coming = self._reader.submit(following)
            yield piece
        self.digests[name] = hashed.hex()

    def announce(self, names: Iterable[str]) -> None:
        """Ask the system to prefetch the tensors `names` into the page cache."""
        if hasattr(os, "posix_fadvise"):
            for stored in sorted((self.tensors[name] for name in names), key=lambda t: (t.file, t.start)):
                os.posix_fadvise(self._open[stored.file], stored.start, stored.nbytes, os.POSIX_FADV_WILLNEED)


def read_header(file: Path) -> list[StoredTensor]:
    """Read the header of a safetensors file: its tensors in file order.

    Raises:
        UsageError: not a safetensors file, or its header and its size contradict each other.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise UsageError(f"{file} is no whole safetensors file: it has {size} bytes, its header {length}")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from error
    except UsageError:
        raise
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is no safetensors file: its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise UsageError(f"{file} is no safetensors file: its header is a {type(header).__name__}")
    header.pop("__metadata__", None)
    tensors = sorted((_stored(file, 8 + length, name, entry) for name, entry in header.items()), key=_position)
    end = 8 + length
    for tensor in tensors:
        if tensor.start != end:
            raise UsageError(f"corrupt safetensors header of {file}: {tensor.name} begins at byte {tensor.start}, not {end}")
        end += tensor.nbytes
        if end > size:
            problem = f"{tensor.name} ends at byte {end} of {size}"
            raise UsageError(f"{file} is truncated, or its safetensors header corrupt: {problem}")
    if end != size:
        raise UsageError(f"corrupt safetensors header of {file}: its tensors end at byte {end} of {size}")
    return tensors


def _listed(root: Path) -> dict[str, str]:
    """Read `{tensor: file name}` from the index in `root`; empty if one file holds everything."""
    if (root / WEIGHTS).exists():
        return {}
    path = root / INDEX
    if not path.exists():
        pickles = sorted(p.name for pattern in ("*.bin", "*.pth", "*.pt") for p in root.glob(pattern))
        if pickles:
            raise UsageError(
                f"{root} holds pickles ({pickles[0]}), which are not read: convert them with python -c "
                f'"from transformers import AutoModelForCausalLM as M; '
                f"M.from_pretrained('{root}', dtype='auto').save_pretrained('{root}-safetensors')\""
            )
        raise UsageError(f"{root} holds neither {WEIGHTS} nor {INDEX}: give the folder of a whole checkpoint")
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is no index with a weight_map: {error!r}") from error
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise UsageError(f"{path} is no index: its weight_map must map tensors to files")
    for name in sorted(set(listed.values())):
        if Path(name).name != name or not (root / name).is_file():
            raise UsageError(f"{path} names {name}, which is not there: fetch the whole checkpoint")
    return listed


def _stored(file: Path, begin: int, name: str, entry: Any) -> StoredTensor:
    """Check one entry of a header by itself."""
    try:
        dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, first, last]
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"corrupt safetensors header of {file}: {name} has the entry: {entry!r:.200}") from error
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UsageError(f"{file}: {name} is of dtype {dtype!r}; allowed: {', '.join(DTYPES)}")
    if any(type(number) is not int or number < 0 for number in numbers):
        raise UsageError(f"corrupt safetensors header of {file}: {name} has shape {shape} and offsets {[first, last]}")
    tensor = StoredTensor(name, file, DTYPES[dtype], tuple(shape), begin + first)
    if last - first != tensor.nbytes:
        raise UsageError(
            f"corrupt safetensors header of {file}: {name} has {last - first} bytes, {dtype} of shape {shape} needs "
            f"{tensor.nbytes}"
        )
    return tensor


def _position(tensor: StoredTensor) -> tuple[int, int]:
    # a tensor without elements begins where its successor does
    return tensor.start, tensor.nbytes


def drop_page_cache(file: int, start: int, size: int) -> None:
    """Drop a part of an open file from the page cache, or start writing it back; do nothing where that is unsupported.

    The pages are reused for the next read or write: in a virtual machine, new pages can be slower than the disk.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, start, size, os.POSIX_FADV_DONTNEED)


def pieces_of(file: int, stored: StoredTensor) -> Iterator[torch.Tensor]:
    """Read a tensor of an open file in pieces of whole rows; raises [`WorkError`] on failure."""
    if not stored.nbytes:
        return
    rows, *rest = stored.shape or (1,)
    size = stored.nbytes // rows
    step = max(1, _CHUNK // size)
    for first in range(0, rows, step):
        piece = torch.empty((min(step, rows - first), *rest), dtype=stored.dtype)
        _read(file, stored, memory_of(piece), stored.start + first * size)
        drop_page_cache(file, stored.start + first * size, len(piece) * size)
        yield piece


def _read(file: int, stored: StoredTensor, target: memoryview, position: int) -> None:
    while len(target):
        try:
            # one call moves at most 2 GiB
            count = os.preadv(file, [target], position)
        except OSError as error:
            raise WorkError(f"cannot read {stored.name} from {stored.file}: {error.strerror}") from error
        if not count:
            raise WorkError(f"{stored.file} became shorter while it was read: {stored.name} is incomplete")
        target, position = target[count:], position + count
