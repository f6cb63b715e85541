"""Store activations batch by batch on the disk or, for a GPU, in the memory that is free."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch

from ..utils import CPU, BackgroundWorker, host_memory, save_tensors, to_device, to_host

#: part of the host's memory that is left to others
_FREE = 0.25
#: tensors that wait to be copied to the host
_AHEAD = 4


@dataclass(frozen=True)
class _Kept:
    """A tensor on the device, being copied to the host, or on disk."""

    nbytes: int
    where: torch.Tensor | Future[torch.Tensor] | Path


class ActivationStore:
    """Named sequences of tensors in a folder, one file per tensor; a committed sequence is complete.

    Tensors of a GPU stay in its memory, then in the host's, as long as there is room, since a disk is many times slower than
    the work between. They are lost with the process and then recomputed.
    """

    def __init__(self, folder: Path, device: torch.device = CPU, room: int = 0) -> None:
        """Prepare without creating anything.

        Args:
            folder: for files.
            device: where tensors are read to.
            room: bytes of a GPU's memory that tensors may take.
        """
        self.folder, self.device = folder, device
        self._kept: dict[str, list[_Kept]] = {}
        # one thread may write while another drops
        self._counting = threading.Lock()
        self._room = room
        # of the host: bytes that are promised and not yet taken
        self._coming = 0
        self._copier = None if device == CPU else BackgroundWorker(device)

    def close(self) -> None:
        """Stop the thread that copies tensors to the host."""
        if self._copier is not None:
            self._copier.close()

    def write(self, name: str, tensors: Iterable[torch.Tensor]) -> None:
        """Write a sequence that exists after `commit`; raises [`WorkError`] if that fails."""
        part = f"{name}.part"
        self.drop(part)
        (self.folder / part).mkdir(parents=True)
        kept: list[_Kept] = []
        for index, tensor in enumerate(tensors):
            kept.append(self._keep(tensor.detach(), self.folder / part / f"{index:06d}"))
            if len(kept) > _AHEAD:
                _arrived(kept[-1 - _AHEAD])
        if not all(isinstance(item.where, Path) for item in kept):
            self._kept[part] = kept

    def commit(self, name: str) -> StoredSequence:
        """Commit a written sequence."""
        self.drop(name)
        part = f"{name}.part"
        if part in self._kept:
            # its files, if any, stay under a name that no later process takes for a sequence
            self._kept[name] = self._kept.pop(part)
        else:
            os.rename(self.folder / part, self.folder / name)
        return StoredSequence(self, name)

    def keep(self, tensors: Iterable[torch.Tensor]) -> StoredSequence:
        """Write a sequence under a name of its own."""
        name = str(max((int(name) for name in self._names()), default=-1) + 1)
        self.write(name, tensors)
        return self.commit(name)

    def read(self, name: str) -> Iterator[torch.Tensor]:
        """Yield the tensors of a sequence, each on the device only while it is used."""
        from safetensors.torch import load_file

        kept = self._kept.get(name)
        places = [item.where for item in kept] if kept else sorted((self.folder / name).iterdir())
        for where in places:
            if isinstance(where, Future):
                where = where.result()
            tensor = load_file(where)["tensor"] if isinstance(where, Path) else where
            yield to_device(tensor.detach(), self.device)

    def has(self, name: str) -> bool:
        """Return whether a sequence is committed."""
        return name in self._kept or (self.folder / name).is_dir()

    def drop(self, name: str) -> None:
        """Remove a sequence, if it exists."""
        for item in self._kept.pop(name, ()):
            if isinstance(item.where, Path):
                item.where.unlink(missing_ok=True)
            elif isinstance(item.where, torch.Tensor):
                self._count(room=item.nbytes)
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def drop_all_but(self, names: Iterable[str]) -> None:
        """Remove the sequences written by `keep`, except `names`."""
        for name in self._names() - set(names):
            self.drop(name)
            self.drop(f"{name}.part")

    def _names(self) -> set[str]:
        """Return the names given by `keep`, also of incomplete sequences."""
        known = [*self._kept, *(path.name for path in self.folder.iterdir())]
        return {name for name in (text.removesuffix(".part") for text in known) if name.isdigit()}

    def _keep(self, tensor: torch.Tensor, path: Path) -> _Kept:
        """Store a tensor in the fastest memory that has room, else at `path`."""
        size = tensor.nbytes
        if self._copier is not None and size <= self._room:
            self._count(room=-size)
            return _Kept(size, tensor)
        if self._copier is not None:
            total, available = host_memory()
            if available - self._coming - size >= _FREE * total:
                self._count(coming=size)
                return _Kept(size, self._copier.submit(self._copied, tensor))
        save_tensors({"tensor": to_host(tensor).contiguous()}, path)
        return _Kept(size, path)

    def _count(self, room: int = 0, coming: int = 0) -> None:
        with self._counting:
            self._room += room
            self._coming += coming

    def _copied(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy to unpinned pages, which are returned to the system when the copy is freed."""
        copy = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(to_host(tensor))
        self._count(coming=-tensor.nbytes)
        return copy


def memory_capacity(device: torch.device, room: int) -> int:
    """Return the bytes of activations that an `ActivationStore` would currently hold in memory."""
    if device == CPU:
        return 0
    total, available = host_memory()
    return room + max(0, int(available - _FREE * total))


class StoredSequence(Iterable[torch.Tensor]):
    """A stored sequence that is read anew at each iteration."""

    def __init__(self, store: ActivationStore, name: str) -> None:
        self.store, self.name = store, name

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self.store.read(self.name)


def _arrived(item: _Kept) -> None:
    """Wait for a copy to the host; raises its error."""
    if isinstance(item.where, Future):
        item.where.result()
