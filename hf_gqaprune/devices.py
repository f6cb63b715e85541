"""A device's name goes in; where this process computes comes out, or one line that says why it cannot."""

from __future__ import annotations

import ctypes
import gc
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from .errors import UsageError, WorkError

T = TypeVar("T")
CPU = torch.device("cpu")
#: all GPUs, each with some of the layers
AUTO = "auto"


def choose(name: str | None) -> torch.device:
    """`cpu`, `cuda` or `cuda:N`; None and `auto`: the first GPU (CUDA or ROCm), or the CPU where there is none.

    Raises:
        UsageError: another name, or a GPU that is not there. Re-fitting is done in float64, which MPS lacks.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name in (None, AUTO):
        return torch.device("cuda", 0) if count else CPU
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if not match:
        raise UsageError(f"--device {name!r} must be cpu, cuda, cuda:N or auto")
    if name == "cpu":
        return CPU
    index = int(match[1] or 0)
    if index >= count:
        there = ", ".join(f"cuda:{index}" for index in range(count)) or "no GPU that torch can use"
        raise UsageError(f"--device {name}: this machine has {there}: choose another, or leave --device out")
    return torch.device("cuda", index)


@contextmanager
def within(device: torch.device, way_out: str, size: int | None = None) -> Iterator[None]:
    """Let this process take no more than `size` bytes of a GPU's memory, None for all of it, until the block ends.

    Raises:
        WorkError: it was too little; one line that ends in `way_out`.
    """
    bound = size if device.type == "cuda" else None
    if bound is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, bound / total), device)
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        raise WorkError(f"the memory of {device} is full ({reason}): {way_out}") from error
    finally:
        if bound is not None:
            torch.cuda.set_per_process_memory_fraction(1.0, device)


def check_held(model: nn.Module) -> None:
    """Raise [`UsageError`] where a weight of `model` is on no device, as what `device_map` has offloaded."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UsageError(
                f"{name} is offloaded, or the model has no weights: a model that the devices do not hold is pruned layer by "
                "layer, with --memory SIZE, or stream_statistics and prune_checkpoint"
            )


def spread(model: Any, places: Mapping[str, int | str | torch.device]) -> None:
    """Let `model`, which lies on the devices that `places` (a `hf_device_map`) names, run over them as accelerate does it."""
    from accelerate.hooks import attach_align_device_hook_on_blocks

    if len(set(places.values())) < 2:
        return
    devices = {name: torch.device(place) for name, place in places.items()}
    # hidden states go from device to device, and the result back to where the input was
    attach_align_device_hook_on_blocks(model, devices | {"": next(iter(devices.values()))}, dict.fromkeys(devices, False))
    model.hf_device_map = dict(places)


class Aside:
    """A thread that works for the one that computes on a device, with a stream of its own there; a context manager.

    What fails is raised where its result is asked for, and nothing that was given after it is done.
    """

    def __init__(self, device: torch.device, ahead: int = 1) -> None:
        """`ahead`: what `later` was given and may still be undone."""
        self._ahead, self._pending = ahead, deque[Future[Any]]()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._device, self._thread = device, ThreadPoolExecutor(1)
        self._failed: BaseException | None = None

    def __enter__(self) -> Aside:
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


class ReadAhead(Generic[T]):
    """What is read piece by piece, by numbers; for a GPU a thread reads the next piece while one is used."""

    def __init__(self, device: torch.device, read: Callable[[int], T], tensors: Callable[[T], Iterable[torch.Tensor]]) -> None:
        """Nothing is read yet.

        Args:
            device: where pieces are used.
            read: reads one, onto the device.
            tensors: all that a piece holds.
        """
        self._read, self._tensors = read, tensors
        self._reader = None if device == CPU else Aside(device)
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


def host_memory() -> tuple[int, int]:
    """Bytes of memory that this process could have, a container's limit counted, and that are not taken."""
    import psutil

    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdecimal():
        total = min(total, int(text))
        available = min(available, total - psutil.Process().memory_info().rss)
    return total, available


def trim() -> None:
    """Give back to the system what was freed among what is in use; the C library, glibc for one, keeps it otherwise."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def release() -> None:
    """Give back what is no longer used of a GPU's memory, so that another process finds it."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
