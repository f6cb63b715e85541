"""Write the shards of a checkpoint tensor by tensor, under the usual names."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ..errors import UsageError, WorkError
from ..utils import CPU, BackgroundWorker
from .identity import Digest, digest, memory_of
from .reader import DTYPES, StoredTensor, drop_page_cache, pieces_of

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_AHEAD = 8  # pieces that wait to be written
_STRETCH = 1 << 26  # bytes that are sent to the disk together
_BEHIND = 4  # stretches that may be on their way there


class ShardWriter:
    """Writer of shards whose tensors are all known beforehand; a context manager that opens every shard once.

    The files equal, byte for byte, those that `save_pretrained` writes of the same tensors. A background thread writes
    while the next tensor is computed.

    Attributes:
        tensors: `{name: StoredTensor}` to be written, in the order of the files.
        files: `{file name: size in bytes}`.
        digests: `{name: hex}` of the tensors passed to `write`; they are on file after `wait`.
    """

    def __init__(
        self, folder: Path, tensors: Mapping[str, torch.Tensor], max_shard_size: int | str, parameters: int
    ) -> None:
        """Lay the shards out without writing anything.

        Args:
            folder: of the shards.
            tensors: names, shapes and dtypes, on the meta device, in the order of the model.
            max_shard_size: bytes, or a text such as "5GB".
            parameters: of the model, for the index.

        Raises:
            UsageError: `max_shard_size` is not a size.
        """
        from huggingface_hub import split_torch_state_dict_into_shards

        try:
            if isinstance(max_shard_size, int) and max_shard_size < 1:
                raise ValueError("it must be at least one byte")
            split = split_torch_state_dict_into_shards(
                dict(tensors), filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
            )
        except ValueError as error:
            raise UsageError(f"max_shard_size={max_shard_size!r} is not a size such as '5GB': {error}") from error
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self.files: dict[str, int] = {}
        self.digests: dict[str, str] = {}
        self._headers: dict[str, bytes] = {}
        for file_name, names in split.filename_to_tensors.items():
            header, stored = lay_out(folder / file_name, {name: tensors[name] for name in names})
            self._headers[file_name] = header
            self.files[file_name] = len(header) + sum(tensor.nbytes for tensor in stored)
            self.tensors |= {tensor.name: tensor for tensor in stored}
        self.index: dict[str, Any] | None = None
        if split.is_sharded:
            metadata = {"total_parameters": parameters, **split.metadata}
            self.index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        self._open: dict[Path, int] = {}
        self._stack = ExitStack()
        self._behind: deque[tuple[int, ...]] = deque()

    def __enter__(self) -> ShardWriter:
        for file_name, size in self.files.items():
            path = self.folder / file_name
            try:
                self._open[path] = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
                self._stack.callback(os.close, self._open[path])
                _write(self._open[path], path, memoryview(self._headers[file_name]), 0)
                # what an interrupted attempt wrote beyond the end, where another was begun
                os.truncate(self._open[path], min(size, os.fstat(self._open[path]).st_size))
            except OSError as error:
                self._stack.close()
                raise WorkError(f"cannot write {path}: {error.strerror}") from error
            except WorkError:
                self._stack.close()
                raise
        self._thread = self._stack.enter_context(BackgroundWorker(CPU, _AHEAD))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._stack:
            if kind is None:
                self.wait()

    def write(self, name: str, pieces: Iterable[torch.Tensor]) -> None:
        """Queue the tensor `name` for writing, whole or in consecutive pieces that must not change before `wait`.

        Raises:
            WorkError: writing this tensor or an earlier one failed, or its size differs from the layout.
        """
        stored = self.tensors[name]
        hashed = Digest(stored.dtype, stored.shape)
        begun = position = stored.start
        for piece in pieces:
            whole = piece.contiguous()
            data = memory_of(whole)
            hashed.update(whole)
            self._thread.later(_write, self._open[stored.file], stored.file, data, position)
            position += len(data)
            if position - begun >= _STRETCH:
                self._thread.later(self._send, self._open[stored.file], begun, position - begun)
                begun = position
        if position != stored.start + stored.nbytes:
            raise WorkError(f"{name} has {position - stored.start} bytes, {stored.nbytes} were laid out for it")
        self._thread.later(self._send, self._open[stored.file], begun, position - begun)
        self.digests[name] = hashed.hex()

    def _send(self, *stretch: int) -> None:
        """Start writing back a stretch, `(file, start, size)`, and drop earlier ones from the page cache."""
        drop_page_cache(*stretch)
        self._behind.append(stretch)
        if len(self._behind) > _BEHIND:
            drop_page_cache(*self._behind.popleft())

    def wait(self) -> None:
        """Wait until every queued tensor is written, though not yet synced to disk; raises [`WorkError`] on failure."""
        self._thread.wait()

    def verify(self, name: str, expected: str) -> bool:
        """Return whether the file already holds the tensor `name` with the digest `expected`; if so, it counts as written."""
        self.wait()
        stored = self.tensors[name]
        file = self._open[stored.file]
        if os.fstat(file).st_size < stored.start + stored.nbytes:
            return False
        if digest(stored.dtype, stored.shape, pieces_of(file, stored)) != expected:
            return False
        self.digests[name] = expected
        return True

    def sync(self) -> None:
        """Sync every shard to disk; raises [`WorkError`] on failure."""
        self.wait()
        for path, file in self._open.items():
            try:
                os.fsync(file)
            except OSError as error:
                raise WorkError(f"cannot write {path}: {error.strerror}") from error


def lay_out(file: Path, tensors: Mapping[str, torch.Tensor]) -> tuple[bytes, list[StoredTensor]]:
    """Compute the header bytes of a safetensors `file` for `tensors` (any device, one dtype), and the tensors' places.

    Tensors are ordered by name, as safetensors does.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in sorted(tensors.items()):
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    stored = [
        StoredTensor(name, file, tensor.dtype, tuple(tensor.shape), len(head) + header[name]["data_offsets"][0])
        for name, tensor in sorted(tensors.items())
    ]
    return head, stored


def _write(file: int, path: Path, data: memoryview, position: int) -> None:
    while len(data):
        try:
            count = os.pwrite(file, data, position)
        except OSError as error:
            raise WorkError(f"cannot write {path}: {error.strerror}") from error
        data, position = data[count:], position + count
