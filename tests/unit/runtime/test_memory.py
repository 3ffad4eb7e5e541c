"""Memory in large pages; freed memory goes back to the system where the C library can do that."""

import mmap
import platform
import subprocess
import sys

import psutil
import pytest
import torch

from hrmtext.runtime import memory
from hrmtext.runtime.memory import (
    LARGE_PAGE,
    MemoryRelease,
    empty_in_large_pages,
    free_memory_bytes,
    release_free_memory,
)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 5, 300_000, 3_000_001])
def test_memory_in_large_pages_is_ordinary_memory_that_begins_at_a_page(count, dtype):
    tensor = empty_in_large_pages(count, dtype)
    assert (tensor.shape, tensor.dtype) == ((count,), dtype)
    tensor.fill_(3.0)
    assert tensor.sum(dtype=torch.float64) == 3.0 * count
    if count == 3_000_001 and hasattr(mmap, "MADV_HUGEPAGE"):
        assert tensor.data_ptr() % LARGE_PAGE == 0


def test_memory_in_large_pages_is_given_back_with_its_tensor():
    before = psutil.Process().memory_info().rss
    tensor = empty_in_large_pages(50_000_000, torch.float32).zero_()
    assert psutil.Process().memory_info().rss - before > 150_000_000
    del tensor
    assert psutil.Process().memory_info().rss - before < 50_000_000


def test_without_large_pages_memory_is_ordinary(monkeypatch):
    def refuse(*arguments):
        raise OSError("no memory of that kind")

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert empty_in_large_pages(3_000_001, torch.float32).shape == (3_000_001,)


STEPS = """
import ctypes, resource, sys
from hrmtext.runtime.memory import keep_free_memory

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
if sys.argv[1] == "keep":
    assert keep_free_memory()
blocks, faults = [0] * 1000, []
for _ in range(10):
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    for index in range(len(blocks)):
        blocks[index] = ctypes.c_void_p(libc.malloc(80_000))
        ctypes.memset(blocks[index], 1, 80_000)
    for block in reversed(blocks):
        libc.free(block)
print(faults[-1] - faults[1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_what_a_step_frees_is_not_fetched_anew_in_the_next():
    def faults(mode):
        command = [sys.executable, "-c", STEPS, mode]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("keep") < 200 < 10_000 < faults("as it is")


@pytest.mark.parametrize("free", [None, 0, memory.KEPT_BYTES, memory.KEPT_BYTES + 1])
def test_free_memory_goes_back_when_it_is_much_or_nobody_knows(monkeypatch, free):
    released = []
    monkeypatch.setattr(memory, "RELEASE_SECONDS", 0.0)
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: free)
    monkeypatch.setattr(memory, "release_free_memory", lambda: released.append(1))
    MemoryRelease(torch.device("cpu")).tick()
    assert len(released) == (free is None or free > memory.KEPT_BYTES)
    MemoryRelease(torch.device("meta")).tick()
    assert len(released) == (free is None or free > memory.KEPT_BYTES)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallinfo2 is glibc's")
def test_the_allocator_tells_what_is_free():
    blocks = [bytearray(60_000) for _ in range(1_000)]
    before = free_memory_bytes()
    if before is None:
        pytest.skip("this glibc has no mallinfo2")
    del blocks[::2]
    assert free_memory_bytes() - before > 25_000_000
