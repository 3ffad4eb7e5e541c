"""What memory a process has taken, and giving freed memory back to the operating system."""

from __future__ import annotations

import ctypes
import mmap
import sys
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LARGE_PAGE = 1 << 21
"""Bytes."""
RELEASE_SECONDS = 1.0
"""Seconds between two releases of a run's free memory."""
KEPT_BYTES = 128 << 20
"""Free memory that a run on the CPU keeps: fetching pages anew takes 2 % of a small step's time."""
MAPPED_BYTES = 32 << 20
"""Size from which memory comes from the system and goes back to it by itself; glibc's most."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


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


def empty_in_large_pages(count: int, dtype: torch.dtype) -> torch.Tensor:
    """(count) numbers on the CPU, of any value, in pages of 2 MiB where the system gives them.

    What is used over and over then lies in one piece of the caches, alike in every run; in pages of
    4 KiB its parts compete for places by chance.
    """
    import torch

    size = -(-count * dtype.itemsize // LARGE_PAGE) * LARGE_PAGE
    if count * dtype.itemsize < LARGE_PAGE // 2 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(count, dtype=dtype)
    try:
        # Begun at a whole page, whatever the system's choice.
        pages = mmap.mmap(-1, size + LARGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them, or no memory: torch then says how much was wanted
        return torch.empty(count, dtype=dtype)
    offset = -ctypes.addressof(ctypes.c_char.from_buffer(pages)) % LARGE_PAGE
    return torch.frombuffer(pages, dtype=dtype, count=count, offset=offset)


def release_free_memory() -> bool:
    """Return the C allocator's free pages to the system; False where it has no such call.

    Packed batches allocate tensors of ever new sizes; glibc keeps the holes between them, and a
    long run on the CPU grows by gigabytes. Takes 2 to 20 ms, and the pages are fetched anew.
    """
    trim = _of_libc("malloc_trim")
    return trim is not None and bool(trim(0))


def keep_free_memory() -> bool:
    """Let the process's C allocator keep up to KEPT_BYTES; False where it is not glibc's."""
    mallopt = _of_libc("mallopt")
    if mallopt is None:
        return False
    # The first alone would leave the second at 128 KiB.
    thresholds = ((_M_TRIM_THRESHOLD, KEPT_BYTES), (_M_MMAP_THRESHOLD, MAPPED_BYTES))
    return all(mallopt(name, size) == 1 for name, size in thresholds)


def free_memory_bytes() -> int | None:
    """What the C allocator holds and nobody uses; None where it does not tell."""
    mallinfo = _of_libc("mallinfo2")
    if mallinfo is None:
        return None
    mallinfo.restype = _MallocInfo
    return int(mallinfo().fordblks)


class _MallocInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks",
                     "uordblks", "fordblks", "keepcost")
    ]  # fmt: skip


class MemoryRelease:
    """Free memory of a CPU run: the process keeps KEPT_BYTES of it from now on, and releases more.

    On other devices it does nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_for_cpu = device.type == "cpu"
        self.last = time.monotonic()
        if self.is_for_cpu:
            keep_free_memory()

    def tick(self) -> None:
        """To be called after every step, between which memory is full of holes."""
        if self.is_for_cpu and time.monotonic() >= self.last + RELEASE_SECONDS:
            free = free_memory_bytes()
            if free is None or free > KEPT_BYTES:
                release_free_memory()
            self.last = time.monotonic()


@lru_cache
def _of_libc(name: str) -> Any:
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):  # not glibc
        return None
