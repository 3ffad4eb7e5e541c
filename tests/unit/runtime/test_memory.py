"""Memory in large pages; freed memory goes back to the system where the C library can do that."""

import mmap
import platform

import psutil
import pytest
import torch

from hrmtext.runtime.memory import LARGE_PAGE, empty_in_large_pages, release_free_memory


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
