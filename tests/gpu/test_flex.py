"""flex attention on a real device: forward and gradient against the fp64 reference."""

import pytest
import torch

from hrmtext.batch import RowLayout
from hrmtext.model import make_plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="flex has a backward on CUDA only"),
]


def results(backend, device, dtype, width):
    layout = RowLayout.from_prefixes([1, 2, 300, 150, 77], [0, 2, 290, 1, 40], num_tokens=560)
    generator = torch.Generator().manual_seed(0)
    q, k, v, arriving = (
        torch.randn(layout.num_tokens, 4, width, generator=generator, dtype=torch.float64)
        .to(torch.bfloat16)
        .to(device, dtype)
        for _ in range(4)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = make_plan(layout, device=device, dtype=dtype, backend=backend).attend(*leaves, 0)
    out.backward(arriving)
    return [x.double().cpu() for x in (out.detach(), *(leaf.grad for leaf in leaves))]


@pytest.mark.filterwarnings("default")  # torch.compile warns about its own inside
@pytest.mark.parametrize("width", [64, 128])
def test_flex_is_as_close_to_fp64_as_the_reference_in_bf16(width):
    exact = results("reference", "cpu", torch.float64, width)
    near = results("reference", "cuda", torch.bfloat16, width)
    found = results("flex", "cuda", torch.bfloat16, width)
    for expected, other, value in zip(exact, near, found, strict=True):
        assert (value - expected).norm() <= 2 * (other - expected).norm() + 1e-9
        assert not bool(value[530:].any())
