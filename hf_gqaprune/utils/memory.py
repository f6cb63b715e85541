"""Measure and release memory, and parse its sizes."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

import torch

from ..errors import UsageError

_SIZE_UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def host_memory() -> tuple[int, int]:
    """Return the total and the available memory of this process in bytes, within the limit of a container."""
    import psutil

    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdecimal():
        total = min(total, int(text))
        available = min(available, total - psutil.Process().memory_info().rss)
    return total, available


def trim_heap() -> None:
    """Return freed heap memory to the system, which the C library would keep."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def empty_gpu_cache() -> None:
    """Release unused GPU memory for other processes."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def parse_size(text: str) -> int:
    """Convert `6GiB`, `8GB` or `512MiB` to bytes; raises [`UsageError`] for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?b)", text.strip(), re.IGNORECASE)
    size = float(match[1]) * _SIZE_UNITS.get(match[2].upper(), 0) if match else 0
    if size < 1:
        raise UsageError(f"--memory {text!r} is not a size such as 6GiB, 8GB or 512MiB")
    return int(size)
