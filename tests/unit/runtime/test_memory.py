"""Freed memory goes back to the system where the C library can do that."""

import platform

import psutil
import pytest

from hrmtext.runtime.memory import release_free_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is glibc's")
def test_holes_between_live_blocks_are_returned():
    blocks = [bytearray(60_000) for _ in range(4_000)]  # below glibc's mmap threshold
    keep = blocks[::50]
    before = psutil.Process().memory_info().rss
    del blocks
    release_free_memory()
    freed = before - psutil.Process().memory_info().rss
    assert freed > 150_000_000, f"{freed / 1e6:.0f} MB of about 235 came back"
    assert len(keep) == 80
