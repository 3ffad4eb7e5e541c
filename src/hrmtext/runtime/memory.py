"""What memory a process has taken, and giving freed memory back to the operating system."""

from __future__ import annotations

import ctypes
import sys
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

RELEASE_SECONDS = 1.0
"""Seconds between two releases of a run's free memory."""


def peak_memory_bytes(device: torch.device) -> int | None:
    """Most memory that this process has held: on a CUDA device by torch, else in main memory.

    None where the system does not tell.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def release_free_memory() -> bool:
    """Return the C allocator's free pages to the system; False where it has no such call.

    Packed batches allocate tensors of ever new sizes; glibc keeps the holes between them, and a
    long run on the CPU grows by gigabytes. Takes 2 to 20 ms, and the pages are fetched anew.
    """
    trim = _malloc_trim()
    return trim is not None and bool(trim(0))


class MemoryRelease:
    """Releases a CPU run's free memory now and then; on other devices it does nothing."""

    def __init__(self, device: torch.device) -> None:
        self.is_for_cpu = device.type == "cpu"
        self.last = time.monotonic()

    def tick(self) -> None:
        """To be called after every step, between which memory is full of holes."""
        if self.is_for_cpu and time.monotonic() >= self.last + RELEASE_SECONDS:
            release_free_memory()
            self.last = time.monotonic()


@lru_cache(maxsize=1)
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # not glibc
        return None
