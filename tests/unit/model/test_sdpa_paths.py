"""Both ways in which sdpa computes a group equal the reference, forward and gradient."""

import pytest
import torch

from hrmtext.batch import RowLayout
from hrmtext.model import make_plan
from hrmtext.model.attention import sdpa

LENGTHS = [5, 40, 1, 17, 18, 90, 2]
PREFIXES = [5, 11, 0, 0, 18, 33, 1]


def attention_and_gradients(backend, dtype, inputs, layout):
    q, k, v, arriving = (x.to(dtype, copy=True) for x in inputs)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = make_plan(layout, dtype=dtype, backend=backend).attend(*leaves, 0)
    out.backward(arriving)
    return [out.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("longest", [0, 20, 1_024], ids=["fused", "mixed", "products"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fused_kernel_and_products_equal_the_reference(monkeypatch, longest, dtype):
    monkeypatch.setitem(sdpa.LONGEST_PRODUCT_ROW, "cpu", longest)
    layout = RowLayout.from_prefixes(LENGTHS, PREFIXES, num_tokens=sum(LENGTHS) + 3)
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(layout.num_tokens, 2, 8, generator=generator, dtype=torch.float64)
        for _ in range(4)
    ]
    exact = attention_and_gradients("reference", torch.float64, inputs, layout)
    found = attention_and_gradients("sdpa", dtype, inputs, layout)
    rounded = attention_and_gradients("reference", dtype, inputs, layout)
    for expected, value, other in zip(exact, found, rounded, strict=True):
        budget = 4 * (other.double() - expected).norm() + 1e-13
        assert (value.double() - expected).norm() <= budget


@pytest.mark.parametrize(("longest", "ways"), [(0, {False}), (20, {False, True})])
def test_the_length_decides_which_way_a_group_goes(monkeypatch, longest, ways):
    monkeypatch.setitem(sdpa.LONGEST_PRODUCT_ROW, "cpu", longest)
    plan = sdpa.SdpaPlan(
        RowLayout.from_prefixes(LENGTHS, PREFIXES), torch.device("cpu"), torch.bfloat16
    )
    assert {group.by_products for group in plan.groups} == ways
    for group in plan.groups:
        expected = torch.bfloat16 if group.by_products else torch.float32
        assert group.dtype == expected
