"""The C++ head gives the loss, its gradients and what is right as fp64 does, within its format."""

import pytest
import torch
from memory_source import MemorySource, random_rows, small_config
from test_cpp_blocks import FORMATS, WIDE, using

from hrmtext.errors import BackendError
from hrmtext.model import Depth
from hrmtext.runtime.native import compiler
from hrmtext.train.build import build_compute
from hrmtext.train.cpp import CppHead, choose_head
from hrmtext.train.cpp import head as head_module
from hrmtext.train.loss import cross_entropy
from hrmtext.train.optim import AdamAtan2
from hrmtext.train.step import TrainStep

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")

CPU = torch.device("cpu")


def drawn(tokens, hidden, vocab):
    draw = torch.Generator().manual_seed(tokens)
    states = torch.randn(tokens, hidden, generator=draw)
    weight = 0.3 * torch.randn(vocab, hidden, generator=draw)
    return states, weight, torch.randint(vocab, (tokens,), generator=draw)


def torch_loss(states, weight, labels, scale, dtype):
    states, weight = (t.detach().to(dtype, copy=True).requires_grad_() for t in (states, weight))
    loss = cross_entropy(states, weight, labels, scale=scale, kernel="chunked")
    loss.total.backward()
    return loss.total.detach(), loss.losses, states.grad, weight.grad, loss.correct


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(
    "sizes", [(300, 128, 512), (64, 64, 96), (1, 32, 64), (61, 96, 160), (0, 32, 64)]
)
def test_loss_and_gradients_are_those_of_fp64_within_the_error_of_torchs(sizes, dtype):
    states, weight, labels = drawn(*sizes)
    states, weight = (t.to(dtype).float() for t in (states, weight))  # alike for all
    scale = 1 / max(1, len(labels))
    expected = torch_loss(states, weight, labels, scale, torch.float64)
    plain = torch_loss(states, weight, labels, scale, dtype)
    for threads in (1, 2, 3):
        with using(threads):
            ours = [t.clone().requires_grad_() for t in (states, weight)]
            head = CppHead(dtype)
            assert head.suits(*ours)
            total, losses, correct = head.loss(*ours, labels, scale)
            assert total.requires_grad and not losses.requires_grad
            total.backward()
        found = (total.detach(), losses, ours[0].grad, ours[1].grad)
        for a, b, exact in zip(found, plain, expected, strict=False):
            if not exact.numel():
                assert not a.numel()
                continue
            share = 4 if dtype == torch.float32 else 1
            error, allowed = (float((x - exact).abs().max()) for x in (a, b))
            assert error <= share * allowed + 4e-6 * float(exact.abs().max()), threads
        assert torch.equal(correct, expected[4])


@pytest.mark.parametrize("dtype", FORMATS)
def test_of_equal_logits_the_first_is_the_highest(dtype):
    weight = torch.zeros(64, 32)
    weight[[7, 40]] = 1.0
    states, labels = torch.ones(3, 32), torch.tensor([7, 40, 8])
    _, losses, correct = CppHead(dtype).loss(states, weight, labels, 1.0)
    assert correct.tolist() == [True, False, False]
    assert losses[0] == losses[1] < losses[2]


def test_logits_far_apart_and_a_state_that_is_not_finite():
    weight = torch.zeros(64, 32)
    weight[3], weight[4] = 100.0, -100.0
    states = torch.ones(4, 32)
    states[3, 5] = torch.nan
    labels = torch.tensor([3, 4, 0, 3])
    _, losses, correct = CppHead(torch.float32).loss(states, weight, labels, 1.0)
    assert losses[:3].tolist() == [0.0, 6400.0, 3200.0]
    assert losses[3].isnan() and correct.tolist() == [True, False, False, False]


def test_the_gradient_that_arrives_is_multiplied_and_an_evaluation_has_none():
    states, weight, labels = drawn(40, 32, 64)
    head, grads = CppHead(torch.float32), []
    for factor in (1.0, 3.0):
        ours = [t.clone().requires_grad_() for t in (states, weight)]
        (factor * head.loss(*ours, labels, 0.5)[0]).backward()
        grads.append([t.grad for t in ours])
    for once, thrice in zip(*grads, strict=True):
        torch.testing.assert_close(thrice, 3 * once)
    with torch.no_grad():
        total, losses, _ = head.loss(states, weight, labels, 0.5)
    torch.testing.assert_close(total, 0.5 * losses.sum())


def test_large_heads_and_other_formats_are_left_to_torch(monkeypatch):
    states, weight, _ = drawn(40, 32, 64)
    head = CppHead(torch.float32)
    assert head.suits(states, weight)
    assert not head.suits(states.double(), weight)
    assert not head.suits(states.bfloat16(), weight.bfloat16())
    assert not head.suits(states, weight[:50])
    monkeypatch.setattr(head_module, "MOST_LOGITS", 40 * 64 - 1)
    assert not head.suits(states, weight)
    monkeypatch.undo()
    monkeypatch.setattr(head_module, "MOST_WEIGHTS", 64 * 32 - 1)
    assert not head.suits(states, weight)


def test_a_run_with_cpp_blocks_takes_it_and_follows_the_run_that_names_another():
    def run(loss):
        config = small_config(model={"preset": "test", **WIDE}, block_kernel="cpp", loss=loss)
        compute = build_compute(config, torch.float32, CPU)
        optimizer = AdamAtan2(compute.shards.parameters.values(), lr=1e-3, ema_decay=0.9)
        step = TrainStep(compute, optimizer, config, CPU)
        assert (step.cpp_head is not None) == (loss == "auto")
        batches = iter(MemorySource(random_rows(48, seed=1)).loader(config, 0, 1))
        depth = Depth.full(config.model.resolve())
        results = [step.run(next(batches), depth=depth, lr=1e-3, step=n) for n in range(4)]
        return torch.tensor([[float(r.sums[0]), r.gradient_norm] for r in results])

    torch.testing.assert_close(run("auto"), run("chunked"), rtol=2e-4, atol=0)


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_kernel_that_computes_wrongly_is_not_used(monkeypatch, caplog, dtype):
    def chosen(kernel):
        return choose_head(small_config(block_kernel=kernel), dtype)

    assert chosen("auto") is not None
    honest = CppHead.compute

    def wrong(self, hidden, weight, labels, scale, gradients):
        return honest(self, hidden, weight * 1.1, labels, scale, gradients)

    monkeypatch.setattr(CppHead, "compute", wrong)
    with pytest.raises(BackendError, match="loss differs"):
        chosen("cpp")
    assert chosen("auto") is None and "slower" in caplog.text
