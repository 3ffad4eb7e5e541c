"""The loss: equal to a dense one, in chunks or whole, and normalised over the whole step."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from memory_source import random_rows, small_config

from hrmtext.batch import IGNORE, PackedBatch
from hrmtext.config import preset
from hrmtext.data.loader import GlobalBatch
from hrmtext.model import build_model, make_plan
from hrmtext.model.depth import Depth
from hrmtext.train.loss import Microbatch, cross_entropy, exact_rows, forward_loss, step_sums
from hrmtext.train.optim import AdamAtan2
from hrmtext.train.precision import ComputeModel
from hrmtext.train.step import TrainStep

CPU = torch.device("cpu")
NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU"
)
CONFIG = preset("test")


def inputs(dtype, num=37, width=8, vocab=50):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num, width, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, vocab, (num,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def gradient_of(function, hidden, weight):
    hidden.grad = weight.grad = None
    total = function()
    total.backward()
    return total.detach(), hidden.grad.clone(), weight.grad.clone()


@pytest.mark.parametrize("rows_per_chunk", [1, 5, 36, 37, 1000])
def test_any_chunking_equals_the_dense_loss_and_gradient(rows_per_chunk):
    hidden, weight, labels = inputs(torch.float64)
    dense = gradient_of(
        lambda: F.cross_entropy(hidden @ weight.T, labels, reduction="sum") * 0.3, hidden, weight
    )
    chunk_bytes = rows_per_chunk * 4 * weight.shape[0]
    ours = gradient_of(
        lambda: cross_entropy(hidden, weight, labels, scale=0.3, chunk_bytes=chunk_bytes).total,
        hidden, weight,
    )  # fmt: skip
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.filterwarnings("default")  # torch.compile warns about its own inside
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["linear", pytest.param("compiled", marks=NEEDS_COMPILER)])
def test_every_kernel_is_as_near_to_fp64_as_the_chunked_one(kernel, dtype):
    hidden, weight, labels = inputs(dtype)
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = exact_hidden @ exact_weight.T
    exact = gradient_of(
        lambda: F.cross_entropy(logits, labels, reduction="sum") * 0.3, exact_hidden, exact_weight
    )
    results = {}
    for name in ("chunked", kernel):
        found = cross_entropy(
            hidden, weight, labels, scale=0.3, chunk_bytes=5 * 4 * 50, kernel=name
        )
        results[name] = gradient_of(lambda found=found: found.total, hidden, weight), found
    for value, other, expected in zip(
        results[kernel][0], results["chunked"][0], exact, strict=True
    ):
        error, theirs = (float((x.double() - expected).norm()) for x in (value, other))
        floor = 4 * torch.finfo(dtype).eps * float(expected.norm())
        assert error <= 2 * max(theirs, floor)
    plain = F.cross_entropy(logits.detach(), labels, reduction="none")
    budget = 4 * torch.finfo(dtype).eps * float(plain.max())
    assert float((results[kernel][1].losses.double() - plain).abs().max()) <= budget
    assert torch.equal(results[kernel][1].correct, results["chunked"][1].correct)


def test_gradcheck_through_an_outer_factor():
    hidden, weight, labels = inputs(torch.float64, num=5, vocab=7)

    def function(h, w):
        return cross_entropy(h, w, labels, scale=0.5, chunk_bytes=2 * 4 * 7).total * 3.0

    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    # Small chunks: the labels of `inputs` are below 7 for a vocabulary of 7.
    assert torch.autograd.gradcheck(function, (hidden, weight))


@pytest.mark.parametrize("rows_per_chunk", [5, 1000])
def test_bf16_is_as_near_to_fp64_as_the_plain_bf16_loss(rows_per_chunk):
    hidden, weight, labels = inputs(torch.bfloat16)
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    exact = gradient_of(
        lambda: F.cross_entropy(exact_hidden @ exact_weight.T, labels, reduction="sum"),
        exact_hidden, exact_weight,
    )  # fmt: skip
    plain = gradient_of(
        lambda: F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum"),
        hidden, weight,
    )  # fmt: skip
    chunk_bytes = rows_per_chunk * 4 * weight.shape[0]
    ours = gradient_of(
        lambda: cross_entropy(hidden, weight, labels, chunk_bytes=chunk_bytes).total,
        hidden, weight,
    )  # fmt: skip
    assert ours[0].dtype == torch.float32
    for a, b, e in zip(ours, plain, exact, strict=True):
        error, theirs = (float((x.double() - e).abs().max()) for x in (a, b))
        assert error <= 1.5 * theirs + 1e-12


@pytest.mark.filterwarnings("default")  # torch.compile warns about its own inside
@pytest.mark.parametrize("rows_per_chunk", [5, 1000])
@pytest.mark.parametrize(
    "kernel", ["chunked", pytest.param("compiled", marks=NEEDS_COMPILER), "linear"]
)
def test_a_master_head_is_rounded_for_the_products_and_its_gradient_is_not(
    kernel, rows_per_chunk, monkeypatch
):
    monkeypatch.setattr("hrmtext.train.loss.PRODUCT_ROWS", 16)  # of a vocabulary of 50
    hidden, rounded, labels = inputs(torch.bfloat16)
    master = rounded.detach().float().requires_grad_()
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, rounded))
    exact = gradient_of(
        lambda: F.cross_entropy(exact_hidden @ exact_weight.T, labels, reduction="sum"),
        exact_hidden, exact_weight,
    )  # fmt: skip
    found = {}
    for weight in (master, rounded):
        found[weight.dtype] = gradient_of(
            lambda weight=weight: cross_entropy(
                hidden, weight, labels, chunk_bytes=rows_per_chunk * 4 * 50, kernel=kernel
            ).total,
            hidden, weight,
        )  # fmt: skip
    assert found[torch.float32][2].dtype == torch.float32
    pairs = zip(found[torch.float32], found[torch.bfloat16], exact, strict=True)
    for ours, copied, expected in pairs:
        error, theirs = (float((x.double() - expected).norm()) for x in (ours, copied))
        assert error <= theirs + 1e-12


def test_no_gradient_is_computed_where_none_is_wanted():
    hidden, weight, labels = inputs(torch.float32)
    with torch.no_grad():
        loss = cross_entropy(hidden, weight, labels)
    assert loss.total.grad_fn is None
    torch.testing.assert_close(
        loss.losses, F.cross_entropy(hidden @ weight.T, labels, reduction="none").detach()
    )
    assert torch.equal(loss.correct, (hidden @ weight.T).argmax(-1) == labels)


def test_only_supervised_tokens_count_and_rows_are_right_as_a_whole():
    rows = [([1, 2, 3], [4, 5]), ([6], [7]), ([8, 9], [10, 11, 12])]
    batch = PackedBatch.from_rows(rows, num_tokens=16)
    micro = Microbatch.prepare(batch, device=CPU, dtype=torch.float32)
    assert micro.labels.tolist() == [4, 5, 7, 10, 11, 12]
    assert micro.row_of.tolist() == [0, 0, 1, 2, 2, 2]
    right = torch.tensor([True, True, False, True, False, True])
    assert exact_rows(right, micro.row_of, 3).tolist() == [True, False, False]


def test_the_model_loss_equals_the_mean_over_the_dense_logits():
    model = build_model(CONFIG, seed=0, dtype=torch.float64)
    batch = PackedBatch.from_rows(random_rows(6))
    micro = Microbatch.prepare(batch, device=CPU, dtype=torch.float64)
    scale = 1 / len(micro.labels)
    depth = Depth.full(CONFIG)
    loss = forward_loss(model, micro, depth=depth, scale=scale, chunk_bytes=4 * 64 * 3)
    loss.total.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    plan = make_plan(batch.layout, dtype=torch.float64, backend="reference")
    logits = model(batch.tokens, batch.positions, plan, depth=depth).logits
    dense = F.cross_entropy(logits, batch.labels, ignore_index=IGNORE)
    dense.backward()
    torch.testing.assert_close(loss.total, dense, rtol=1e-12, atol=1e-12)
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-9, atol=1e-12)
    sums = step_sums(loss, micro)
    keep = batch.labels != IGNORE
    right = (logits.argmax(-1) == batch.labels)[keep]
    assert sums[1] == right.sum()
    assert sums[3] == 6


def step_batch(rows, rows_per_bin):
    bins = [
        PackedBatch.from_rows(rows[at : at + rows_per_bin])
        for at in range(0, len(rows), rows_per_bin)
    ]
    supervised = sum(len(response) for _, response in rows)
    return GlobalBatch(
        index=0,
        epoch=0,
        bins=bins,
        num_supervised_tokens=supervised,
        num_tokens=sum(b.layout.num_tokens for b in bins),
    )


def test_accumulated_microbatches_equal_one_batch():
    rows = random_rows(12)
    gradients = []
    for rows_per_bin in (12, 5, 1):
        model = build_model(CONFIG, seed=0, dtype=torch.float64)
        compute = ComputeModel(model, torch.float64)
        step = TrainStep(compute, AdamAtan2(model.parameters(), lr=0.1), small_config(), CPU)
        sums = step.accumulate(step_batch(rows, rows_per_bin), Depth.from_bp_steps(CONFIG, 5))
        gradients.append([sums[0], *(p.grad for p in model.parameters())])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)
