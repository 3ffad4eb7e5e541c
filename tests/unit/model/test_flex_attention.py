"""The flex backend: its blocks hold every visible pair, and its forward pass is the reference's."""

import shutil

import numpy as np
import pytest
import torch

from hrmtext.batch import RowLayout
from hrmtext.errors import BackendError
from hrmtext.model import make_plan
from hrmtext.model.attention import flex
from hrmtext.model.attention.reference import dense_mask

CPU = torch.device("cpu")
NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None, reason="flex is compiled, which needs a C++ compiler"
)


def random_layout(seed, padding):
    """Long and short rows with prompts; several span more than one block of 128."""
    rng = np.random.default_rng(seed)
    lengths = [1, 2, 300, *rng.integers(1, 200, 4).tolist()]
    prefixes = [0, 2, 290, *(int(rng.integers(0, n + 1)) for n in lengths[3:])]
    return RowLayout.from_prefixes(lengths, prefixes, sum(lengths) + padding)


@pytest.mark.parametrize("padding", [0, 37])
@pytest.mark.parametrize("seed", range(4))
def test_blocks_say_empty_full_or_mixed_as_the_dense_mask_does(seed, padding):
    layout = random_layout(seed, padding)
    used = sum(layout.lengths)
    mask = dense_mask(layout).numpy()
    mask[range(used, len(mask)), range(used, len(mask))] = True  # padding sees itself
    block_mask = flex.make_block_mask(*flex.intervals(layout), CPU)
    query, key = torch.meshgrid(*[torch.arange(len(mask))] * 2, indexing="ij")
    assert np.array_equal(block_mask.mask_mod(0, 0, query, key).numpy(), mask)
    counts, order = block_mask.kv_num_blocks[0, 0], block_mask.kv_indices[0, 0]
    full_counts, full_order = block_mask.full_kv_num_blocks[0, 0], block_mask.full_kv_indices[0, 0]
    num_full = 0
    for b in range(len(counts)):
        mixed = set(order[b, : counts[b]].tolist())
        full = set(full_order[b, : full_counts[b]].tolist())
        assert not mixed & full
        for c in range(len(counts)):
            part = mask[b * 128 : b * 128 + 128, c * 128 : c * 128 + 128]
            assert part.any() <= (c in mixed or c in full), "a visible pair would be skipped"
            assert (c not in full) or part.all(), "a hidden pair would be seen"
            num_full += c in full
    assert num_full > 0, "the case shows a full block"


@NEEDS_COMPILER
@pytest.mark.filterwarnings("default")  # torch.compile warns about its own inside
def test_the_compiled_forward_is_as_close_to_fp64_as_the_reference():
    layout = random_layout(0, 11)
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(layout.num_tokens, 2, 16, generator=generator, dtype=torch.float64)
        for _ in range(3)
    ]
    exact = make_plan(layout, dtype=torch.float64, backend="reference").attend(*inputs, 0)
    narrow = [x.float() for x in inputs]
    other = make_plan(layout, backend="reference").attend(*narrow, 0).double()
    plan = make_plan(layout, backend="flex")
    found = plan.attend(*narrow, 0)
    assert (found.double() - exact).norm() <= 4 * (other - exact).norm()
    assert not bool(found[sum(layout.lengths) :].any())


@NEEDS_COMPILER
def test_a_gradient_on_the_cpu_is_refused_before_anything_is_computed():
    layout = random_layout(1, 0)
    q = torch.zeros(layout.num_tokens, 1, 16, requires_grad=True)
    plan = make_plan(layout, backend="flex")
    with pytest.raises(
        BackendError, match="no backward pass on the CPU; train with attention=sdpa"
    ):
        plan.attend(q, q, q, 0)


def test_fp64_and_machines_without_compiler_are_refused_by_name(monkeypatch):
    layout = random_layout(1, 0)
    with pytest.raises(BackendError, match="'flex' cannot run: it computes in fp32, bf16 or fp16"):
        make_plan(layout, dtype=torch.float64, backend="flex")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(BackendError, match="needs a C\\+\\+ compiler"):
        make_plan(layout, backend="flex")
