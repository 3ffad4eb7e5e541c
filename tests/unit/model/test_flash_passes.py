"""Two passes of variable-length attention equal the dense mask; kernels are chosen with reason."""

import logging

import pytest
import torch
import torch.nn.attention.varlen as torch_varlen
from hypothesis import given, settings
from hypothesis import strategies as st

from hrmtext.batch import RowLayout
from hrmtext.errors import BackendError
from hrmtext.model import make_plan
from hrmtext.model.attention import api, varlen
from hrmtext.model.attention.flash import FlashPlan, find_segments
from hrmtext.model.attention.reference import dense_mask

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def layout_of(rows, padding=0):
    """A layout from (length, [(start, end) of a bidirectional block, ...]) rows."""
    ends, lengths = [], []
    for length, blocks in rows:
        visible = torch.arange(1, length + 1)
        for start, end in blocks:
            visible[start:end] = end
        ends.append(visible)
        lengths.append(length)
    visible_end = torch.cat([*ends, torch.zeros(padding, dtype=torch.int64)])
    return RowLayout(num_tokens=len(visible_end), lengths=tuple(lengths), visible_end=visible_end)


@st.composite
def layouts(draw):
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        length = draw(st.integers(1, 12))
        cuts = draw(st.lists(st.integers(0, length), max_size=6, unique=True).map(sorted))
        rows.append((length, list(zip(cuts[::2], cuts[1::2], strict=False))))
    return layout_of(rows, draw(st.integers(0, 3)))


def results(backend, layout, dtype=torch.float64):
    """Output and the gradients of queries, keys and values."""
    generator = torch.Generator().manual_seed(layout.num_tokens)
    q, k, v, arriving = (
        torch.randn(layout.num_tokens, 2, 8, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(4)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = make_plan(layout, dtype=dtype, backend=backend).attend(*leaves, 0)
    out.backward(arriving)
    return [out.detach(), *(x.grad for x in leaves)]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(layouts())
def test_two_passes_equal_the_dense_mask_in_output_and_gradient(layout):
    expected, found = results("reference", layout), results("flash_reference", layout)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "rows",
    [
        [(5, [(0, 3)])],
        [(7, [(0, 7)])],
        [(4, [])],
        [(1, []), (1, [(0, 1)]), (6, [(0, 6)]), (3, [(0, 1)])],
        [(12, [(0, 4), (7, 10)]), (5, [(0, 2), (2, 5)])],
    ],
    ids=["prefix", "all prompt", "causal", "one-token rows", "chat"],
)
@pytest.mark.parametrize("padding", [0, 4])
def test_padding_gives_zeros_and_zero_gradients(rows, padding):
    layout = layout_of(rows, padding)
    expected, found = results("reference", layout), results("flash_reference", layout)
    used = sum(layout.lengths)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-11, atol=1e-12)
        assert not bool(other[used:].any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_as_close_to_fp64_as_the_reference(dtype):
    layout = layout_of([(9, [(0, 4)]), (14, [(0, 5), (8, 12)]), (6, [(0, 6)])], 2)
    exact = results("reference", layout)
    near, found = results("reference", layout, dtype), results("flash_reference", layout, dtype)
    for expected, other, value in zip(exact, near, found, strict=True):
        budget = 2 * (other.double() - expected).norm() + 1e-13
        assert (value.double() - expected).norm() <= budget


@settings(max_examples=100, deadline=None, derandomize=True)
@given(layouts())
def test_the_segments_cover_each_visible_pair_once_and_no_other(layout):
    seen = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.int64)
    for segments, causal in zip(find_segments(layout), (False, True), strict=True):
        for start, count, key, num_keys in zip(*(x.tolist() for x in segments), strict=True):
            for i in range(count):
                last = num_keys - count + i + 1 if causal else num_keys
                seen[start + i, key : key + last] += 1
    assert torch.equal(seen, dense_mask(layout).long())


def test_usual_rows_are_two_passes_over_prefixes_and_whole_rows_without_repeated_keys():
    plan = FlashPlan(
        layout_of([(5, [(0, 3)]), (9, [(0, 6)])], 2), CPU, torch.float32, kernel="reference"
    )
    first, second = plan.passes
    assert (first.causal, first.max_q, first.max_k) == (False, 6, 6)
    assert (second.causal, second.max_q, second.max_k) == (True, 3, 9)
    assert first.cu_q.tolist() == first.cu_k.tolist() == [0, 3, 9]
    assert second.cu_q.tolist() == [0, 2, 5] and second.cu_k.tolist() == [0, 5, 14]
    assert first.cu_q.dtype == second.cu_k.dtype == torch.int32
    # The second pass reads keys and values as they lie.
    assert first.keys.tolist() == [0, 1, 2, *range(5, 11)] and second.keys is None
    assert not first.repeats and not second.repeats


def test_prompts_alone_and_causal_rows_alone_are_one_pass_without_any_copy():
    for blocks in ([(0, 4)], []):
        plan = FlashPlan(
            layout_of([(4, blocks), (4, blocks)]), CPU, torch.float32, kernel="reference"
        )
        assert len(plan.passes) == 1 and plan.order is None and plan.passes[0].keys is None


def test_the_torch_kernel_is_called_as_its_documentation_says(monkeypatch):
    """`varlen_attn` runs on CUDA only; here its documented meaning stands in for it."""

    def documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
        assert scale == query.shape[-1] ** -0.5 and cu_seq_q.dtype == torch.int32
        assert max_q == int(cu_seq_q.diff().max()) and max_k == int(cu_seq_k.diff().max())
        causal = {(-1, 0): True, (-1, -1): False}[window_size]
        return varlen.reference_kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, causal)

    monkeypatch.setattr(torch_varlen, "varlen_attn", documented)
    monkeypatch.setattr(varlen, "kernel_problem", lambda *_: None)
    monkeypatch.setattr("hrmtext.model.attention.flash.kernel_problem", lambda *_: None)
    layout = layout_of([(5, [(0, 3)]), (12, [(0, 4), (7, 10)]), (3, [])], 1)
    expected, found = results("reference", layout), results("flash_torch", layout)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-11, atol=1e-12)


def test_the_probe_accepts_the_reference_and_finds_wrong_kernels():
    assert varlen.probe(varlen.reference_kernel, CPU, torch.bfloat16, 64) is None

    def top_left(q, k, v, cu_q, cu_k, max_q, max_k, causal):
        if not causal:
            return varlen.reference_kernel(q, k, v, cu_q, cu_k, max_q, max_k, False)
        spans = zip(cu_q.tolist(), cu_k.tolist(), cu_q.diff().tolist(), strict=False)
        keys = torch.cat([torch.arange(k0, k0 + n) for _, k0, n in spans])
        return varlen.reference_kernel(q, k[keys], v[keys], cu_q, cu_q, max_q, max_q, True)

    def unscaled(q, *rest):
        return varlen.reference_kernel(q * q.shape[-1] ** 0.5, *rest)

    def without_gradient_of_keys(q, k, *rest):
        return varlen.reference_kernel(q, k.detach() + 0 * k, *rest)

    assert "causal=True" in varlen.probe(top_left, CPU, torch.bfloat16, 64)
    assert "output" in varlen.probe(unscaled, CPU, torch.bfloat16, 64)
    assert "dk" in varlen.probe(without_gradient_of_keys, CPU, torch.bfloat16, 64)


@pytest.mark.parametrize("backend", ["flash", "flash_torch", "flash_attn"])
def test_flash_by_name_refuses_the_cpu_with_the_reason(backend):
    with pytest.raises(BackendError, match="needs a CUDA device, the tensors are on the CPU"):
        make_plan(layout_of([(4, [(0, 2)])]), dtype=torch.bfloat16, backend=backend)


def test_wrong_number_formats_and_widths_are_refused_before_anything_runs():
    assert "bf16 or fp16, not float32" in varlen.kernel_problem("torch", CUDA, torch.float32)
    for width in (12, 264):
        reason = varlen.kernel_problem("torch", CUDA, torch.bfloat16, width)
        assert f"multiples of 8 up to 256, not {width}" in reason


def test_a_kernel_that_cannot_run_is_a_reason_not_a_crash(monkeypatch):
    varlen._probe.cache_clear()
    monkeypatch.setattr(
        varlen, "probe", lambda *_: (_ for _ in ()).throw(RuntimeError("needs sm80\nlong trace"))
    )
    with pytest.raises(BackendError, match=r"torch: it failed a small test \(needs sm80\)"):
        varlen.find_kernel(CUDA, torch.bfloat16, 64)
    varlen._probe.cache_clear()


def test_auto_is_sdpa_on_the_cpu_and_the_first_working_kernel_on_a_gpu(monkeypatch, caplog):
    api._choose.cache_clear()
    varlen._probe.cache_clear()
    assert api._choose(CPU, torch.bfloat16, 64) == "sdpa"
    assert api._choose(CUDA, torch.float32, 64) == "sdpa"
    problems = {"torch": "it failed", "flash_attn": None}
    monkeypatch.setattr(varlen, "probe", lambda kernel, *_: problems[NAMES[kernel]])
    with caplog.at_level(logging.INFO, logger="hrmtext"):
        assert api._choose(CUDA, torch.bfloat16, 64) == "flash"
        assert api._choose(CUDA, torch.bfloat16, 12) == "sdpa"
        api._choose(CUDA, torch.bfloat16, 64)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "flash_attn kernel" in said[0] and "not 12" in said[1]
    api._choose.cache_clear()
    varlen._probe.cache_clear()


NAMES = {kernel: name for name, kernel in varlen.KERNELS.items()}


def test_an_unknown_backend_names_the_nearest():
    with pytest.raises(BackendError, match="perhaps you meant 'flash'"):
        make_plan(layout_of([(3, [])]), backend="flsh")
