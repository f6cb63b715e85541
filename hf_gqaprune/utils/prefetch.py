"""Read, copy and write in a background thread while the device computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch

from .device import CPU

T = TypeVar("T")


class BackgroundWorker:
    """A thread with a CUDA stream of its own; a context manager.

    An error is raised where the result is awaited, and later tasks are not run.
    """

    def __init__(self, device: torch.device, ahead: int = 1) -> None:
        """Start the thread; `ahead` is the number of tasks of `later` that may be pending."""
        self._ahead, self._pending = ahead, deque[Future[Any]]()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._device, self._thread = device, ThreadPoolExecutor(1)
        self._failed: BaseException | None = None

    def __enter__(self) -> BackgroundWorker:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Wait for all tasks; none may be submitted afterwards."""
        self._thread.shutdown()

    def submit(self, work: Callable[..., T], *arguments: Any) -> Future[T]:
        """Run `work` after the earlier tasks, once the device has computed its `arguments`."""
        ready = None if self._stream is None else torch.cuda.current_stream(self._device).record_event()
        return self._thread.submit(self._do, ready, work, arguments)

    def later(self, work: Callable[..., object], *arguments: Any) -> None:
        """Submit a task without a result; raises the error of an earlier one, as `wait` does."""
        while len(self._pending) >= self._ahead:
            self._pending.popleft().result()
        self._pending.append(self.submit(work, *arguments))

    def wait(self) -> None:
        """Wait for the tasks of `later`."""
        while self._pending:
            self._pending.popleft().result()

    def take_over(self, tensors: Iterable[torch.Tensor]) -> None:
        """Protect the memory of `tensors` made by the thread until the current stream has finished with them."""
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
    """Reader of numbered pieces; for a GPU a thread reads the next piece while one is used."""

    def __init__(self, device: torch.device, read: Callable[[int], T], tensors: Callable[[T], Iterable[torch.Tensor]]) -> None:
        """Prepare without reading.

        Args:
            device: where pieces are used.
            read: reads one, onto the device.
            tensors: returns all tensors of a piece.
        """
        self._read, self._tensors = read, tensors
        self._reader = None if device == CPU else BackgroundWorker(device)
        self._coming: dict[int, Future[T]] = {}

    def take(self, number: int, following: int | None) -> T:
        """Return the piece `number` and prefetch `following`, None after the last."""
        if self._reader is None:
            return self._read(number)
        coming = self._coming.pop(number, None)
        piece = self._read(number) if coming is None else coming.result()
        self._reader.take_over(self._tensors(piece))
        self._coming = {} if following is None else {following: self._reader.submit(self._read, following)}
        return piece

    def close(self) -> None:
        """Wait for the thread and stop it."""
        self._coming.clear()
        if self._reader is not None:
            self._reader.close()


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in host memory, copied through pinned pages from a GPU."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the tensor on a device, copied asynchronously through pinned pages to a GPU."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
    return pinned.to(device, non_blocking=True)
