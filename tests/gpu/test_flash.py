"""FlashAttention under PrefixLM on a real device: every kernel against the fp64 reference."""

import pytest
import torch

from hrmtext.batch import RowLayout
from hrmtext.errors import BackendError
from hrmtext.model import make_plan
from hrmtext.model.attention import varlen
from hrmtext.model.attention.api import _choose

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def layout_with_blocks(seed, padding):
    """Rows of one to 700 tokens: causal, all prompt, one prompt, several blocks."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [1, 1, 2, *torch.randint(3, 700, (9,), generator=generator).tolist()]
    ends = []
    for row, length in enumerate(lengths):
        end = torch.arange(1, length + 1)
        prefix = (0, 1, length, length // 3)[row % 4]
        end[:prefix] = prefix
        if row % 4 == 3 and length > 30:
            end[length // 2 : length // 2 + 9] = length // 2 + 9
        ends.append(end)
    visible_end = torch.cat([*ends, torch.zeros(padding, dtype=torch.int64)])
    return RowLayout(num_tokens=len(visible_end), lengths=tuple(lengths), visible_end=visible_end)


def results(backend, layout, device, dtype, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v, arriving = (
        torch.randn(layout.num_tokens, 4, width, generator=generator, dtype=torch.float64)
        .to(torch.bfloat16 if dtype == torch.float64 else dtype)
        .to(device, dtype)
        for _ in range(4)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    plan = make_plan(layout, device=device, dtype=dtype, backend=backend, head_dim=width)
    out = plan.attend(*leaves, 0)
    out.backward(arriving)
    return [x.double().cpu() for x in (out.detach(), *(leaf.grad for leaf in leaves))]


@pytest.mark.parametrize("kernel", varlen.FAST_KERNELS)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("seed", range(3))
def test_each_kernel_is_as_close_to_fp64_as_the_reference_in_bf16(kernel, width, seed):
    device, dtype = torch.device("cuda", torch.cuda.current_device()), torch.bfloat16
    if reason := varlen.kernel_problem(kernel, device, dtype, width):
        pytest.skip(f"{kernel}: {reason}")
    backend = {"torch": "flash_torch", "flash_attn": "flash_attn"}[kernel]
    layout = layout_with_blocks(seed, padding=37)
    exact = results("reference", layout, "cpu", torch.float64, width, seed)
    near = results("reference", layout, device, dtype, width, seed)
    found = results(backend, layout, device, dtype, width, seed)
    used = sum(layout.lengths)
    for expected, other, value in zip(exact, near, found, strict=True):
        assert (value - expected).norm() <= 2 * (other - expected).norm() + 1e-9
        assert not bool(value[used:].any())


def test_auto_takes_flash_in_bf16_where_a_kernel_runs_and_sdpa_in_fp32():
    device = torch.device("cuda", torch.cuda.current_device())
    assert _choose(device, torch.float32, 64) == "sdpa"
    try:
        varlen.find_kernel(device, torch.bfloat16, 64)
    except BackendError:
        assert _choose(device, torch.bfloat16, 64) == "sdpa"
    else:
        assert _choose(device, torch.bfloat16, 64) == "flash"


def test_attend_makes_the_host_wait_for_nothing():
    layout = layout_with_blocks(0, padding=5)
    try:
        plan = make_plan(layout, device="cuda", dtype=torch.bfloat16, backend="flash", head_dim=64)
    except BackendError as error:
        pytest.skip(str(error))
    q, k, v = (
        torch.randn(layout.num_tokens, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan.attend(q, k, v, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
