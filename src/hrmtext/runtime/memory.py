"""Giving freed memory back to the operating system."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any


def release_free_memory() -> bool:
    """Return the C allocator's free pages to the system; False where it has no such call.

    Packed batches allocate tensors of ever new sizes; glibc keeps the holes between them, and a
    long run on the CPU grows by gigabytes. Takes some 20 ms, so call it every hundred steps.
    """
    trim = _malloc_trim()
    return trim is not None and bool(trim(0))


@lru_cache(maxsize=1)
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # not glibc
        return None
