"""TODO."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch

from .device import CPU

T = TypeVar("T")


class BackgroundWorker:
    """A thread that works for the one that computes on a device, with a stream of its own there; a context manager.

    What fails is raised where its result is asked for, and nothing that was given after it is done.
    """

    def __init__(self, device: torch.device, ahead: int = 1) -> None:
        """`ahead`: what `later` was given and may still be undone."""
        self._ahead, self._pending = ahead, deque[Future[Any]]()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._device, self._thread = device, ThreadPoolExecutor(1)
        self._failed: BaseException | None = None

    def __enter__(self) -> BackgroundWorker:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Wait until all that was submitted is done; nothing may be given after it."""
        self._thread.shutdown()

    def submit(self, work: Callable[..., T], *arguments: Any) -> Future[T]:
        """Let the thread do `work` after what it was given before, once the device has computed its `arguments`."""
        ready = None if self._stream is None else torch.cuda.current_stream(self._device).record_event()
        return self._thread.submit(self._do, ready, work, arguments)

    def later(self, work: Callable[..., object], *arguments: Any) -> None:
        """`submit` where no result is asked for; raises what failed before, as `wait` does."""
        while len(self._pending) >= self._ahead:
            self._pending.popleft().result()
        self._pending.append(self.submit(work, *arguments))

    def wait(self) -> None:
        """Until all that `later` was given is done."""
        while self._pending:
            self._pending.popleft().result()

    def take_over(self, tensors: Iterable[torch.Tensor]) -> None:
        """Keep memory of `tensors` that the thread made from others until what is computed with it now is done."""
        if self._stream is not None:
            for tensor in tensors:
                tensor.record_stream(torch.cuda.current_stream(self._device))

    def _do(self, ready: Any, work: Callable[..., T], arguments: tuple[Any, ...]) -> T:
        if self._failed is not None:
            raise self._failed
        try:
            return self._done(ready, work, arguments)
        except BaseException as error:
            self._failed = error
            raise

    def _done(self, ready: Any, work: Callable[..., T], arguments: tuple[Any, ...]) -> T:
        if self._stream is None:
            return work(*arguments)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            found = work(*arguments)
        self._stream.synchronize()
        return found


class Prefetcher(Generic[T]):
    """What is read piece by piece, by numbers; for a GPU a thread reads the next piece while one is used."""

    def __init__(self, device: torch.device, read: Callable[[int], T], tensors: Callable[[T], Iterable[torch.Tensor]]) -> None:
        """Nothing is read yet.

        Args:
            device: where pieces are used.
            read: reads one, onto the device.
            tensors: all that a piece holds.
        """
        self._read, self._tensors = read, tensors
        self._reader = None if device == CPU else BackgroundWorker(device)
        self._coming: dict[int, Future[T]] = {}

    def take(self, number: int, following: int | None) -> T:
        """The piece `number`; `following` is the one that is asked for next, None after the last."""
        if self._reader is None:
            return self._read(number)
        coming = self._coming.pop(number, None)
        piece = self._read(number) if coming is None else coming.result()
        self._reader.take_over(self._tensors(piece))
        self._coming = {} if following is None else {following: self._reader.submit(self._read, following)}
        return piece

    def close(self) -> None:
        """Nothing more is asked for: wait for the thread."""
        self._coming.clear()
        if self._reader is not None:
            self._reader.close()


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in the host's memory, or the tensor if it is there; of a GPU's in pages that are kept for the next one."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on a device, or the tensor if it is there; to a GPU through kept pages, without waiting."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
    return pinned.to(device, non_blocking=True)
