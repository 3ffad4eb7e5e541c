"""Loss and gradients of a whole model in one kernel call are those by autograd, to the bit."""

import dataclasses

import pytest
import torch
from memory_source import MemorySource, random_rows, small_config
from test_cpp_blocks import FORMATS, WIDE, using

from hrmtext.config import preset
from hrmtext.config.model import ARCHITECTURES
from hrmtext.data.collate import padding_bin
from hrmtext.errors import DataError
from hrmtext.model import Depth
from hrmtext.runtime.native import compiler
from hrmtext.train.build import build_compute
from hrmtext.train.cpp import CppModel
from hrmtext.train.optim import AdamAtan2
from hrmtext.train.step import TrainStep

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")

CPU = torch.device("cpu")
SHAPES = {
    "test": {},
    "one block a stack, two cycles of three": {"num_layers_per_stack": 1, "L_cycles": 3},
    **{name: dict(values) for name, values in ARCHITECTURES.items()},
}


def step_of(dtype=torch.float32, **changes):
    model = {**WIDE, **changes.pop("model", {})}
    shape = preset("test", **model)
    most = shape.H_cycles * (shape.L_cycles + 1)
    bp = {"bp_first": min(2, most), "bp_last": min(5, most)}
    config = small_config(
        model={"preset": "test", **model}, block_kernel="cpp", **{**bp, **changes}
    )
    compute = build_compute(config, dtype, CPU)
    optimizer = AdamAtan2(compute.shards.parameters.values(), lr=1e-3, ema_decay=0.9)
    return TrainStep(compute, optimizer, config, CPU)


def batches_of(step, **changes):
    return iter(MemorySource(random_rows(48, seed=1), **changes).loader(step.config, 0, 1))


def gradients(step, batch, depth):
    sums = step.accumulate(batch, depth)
    named = step.compute.master.named_parameters()
    return sums, {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.fixture
def calls(monkeypatch):
    """The depths whose microbatches were computed in one call."""
    made, honest = [], CppModel.add_gradients

    def counted(self, batch, depth, scale):
        made.append(depth)
        return honest(self, batch, depth, scale)

    monkeypatch.setattr(CppModel, "add_gradients", counted)
    return made


def assert_as_by_autograd(step, batch, depth, calls):
    calls.clear()
    sums, found = gradients(step, batch, depth)
    assert len(calls) == len(batch.bins)
    model, step.cpp_model = step.cpp_model, None
    expected_sums, expected = gradients(step, batch, depth)
    step.cpp_model = model
    assert len(calls) == len(batch.bins)
    torch.testing.assert_close(sums, expected_sums, rtol=1e-12, atol=0)
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    return found


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_gradients_and_sums_are_those_of_autograd_at_every_depth(changes, dtype, calls):
    step = step_of(dtype, model=changes)
    config = step.config.model.resolve()
    batch = next(batches_of(step))
    all_calls = config.H_cycles * (config.L_cycles + 1)
    with_table = set()
    for bp_steps in range(min(2, all_calls), all_calls + 1):
        depth = Depth.from_bp_steps(config, bp_steps)
        for threads in (1, 2):
            with using(threads):
                found = assert_as_by_autograd(step, batch, depth, calls)
        with_table.add("model.embed_tokens.weight" in found)
    assert True in with_table


def test_microbatches_add_up_and_one_of_padding_adds_nothing(calls):
    step = step_of()
    batch = next(batches_of(step, rows_per_step=12, rows_per_bin=3))
    depth = Depth.full(step.config.model.resolve())
    assert len(batch.bins) == 4
    found = assert_as_by_autograd(step, batch, depth, calls)
    padded = dataclasses.replace(batch, bins=[*batch.bins, padding_bin(5)])
    _, with_padding = gradients(step, padded, depth)
    assert len(calls) == 8  # the padding takes the general way
    for name, value in found.items():
        torch.testing.assert_close(with_padding[name], value, rtol=0, atol=0)


def test_frozen_weights_get_no_gradient(calls):
    step = step_of()
    frozen = ("model.embed_tokens.weight", "lm_head.weight")
    named = dict(step.compute.master.named_parameters())
    frozen += (next(name for name in named if "H_module" in name),)
    for name in frozen:
        named[name].requires_grad_(False)
    found = assert_as_by_autograd(
        step, next(batches_of(step)), Depth.full(step.config.model.resolve()), calls
    )
    assert not set(frozen) & found.keys() and len(found) == len(named) - len(frozen)


def test_a_step_takes_it_but_for_other_losses_and_where_telemetry_looks_in(calls):
    def run(**changes):
        calls.clear()
        step = step_of(**changes)
        batches, depth = batches_of(step), Depth.full(step.config.model.resolve())
        for number in range(4):
            step.run(next(batches), depth=depth, lr=1e-3, step=number)
        return len(calls)

    assert run() == 8  # two microbatches a step
    assert run(telemetry_every=2) == 6  # it looks into the first
    assert run(elastic={"early_loss_weight": 0.5}) == 0
    assert run(loss="chunked") == 0


def test_a_token_beyond_the_vocabulary_is_refused_and_nothing_is_changed():
    step = step_of()
    batch = next(batches_of(step))
    tokens = batch.bins[0].tokens.clone()
    depth = Depth.full(step.config.model.resolve())
    bad = step.config.model.resolve().vocab_size
    for token in (bad, -1):
        tokens[7] = token
        broken = dataclasses.replace(batch.bins[0], tokens=tokens)
        with pytest.raises(DataError, match=rf"token {token} is not in the vocabulary of {bad}"):
            step.accumulate(dataclasses.replace(batch, bins=[broken]), depth)
        assert all(p.grad is None for p in step.compute.master.parameters())
