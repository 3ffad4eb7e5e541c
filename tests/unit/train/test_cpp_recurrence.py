"""A whole recurrence in one call of the kernel is its blocks called one by one, to the bit."""

import pytest
import torch
from memory_source import MemorySource, random_rows, small_config
from test_cpp_blocks import FORMATS, SELECT, WIDE, stream, using

from hrmtext.config import preset
from hrmtext.config.model import ARCHITECTURES
from hrmtext.model import Depth, build_model
from hrmtext.runtime.native import compiler
from hrmtext.train.build import build_compute
from hrmtext.train.cpp import CppRecurrence
from hrmtext.train.optim import AdamAtan2
from hrmtext.train.step import TrainStep

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")

CPU = torch.device("cpu")
PADDING = 5
SHAPES = {
    "test": {},
    "one block a stack, four L calls": {"num_layers_per_stack": 1, "L_cycles": 4},
    "three cycles": {"H_cycles": 3, "L_cycles": 1},
    **{name: dict(values) for name, values in ARCHITECTURES.items()},
}


def run(blocks, model, depth=None, select=None, *, one_by_one=False, early=0.0, threads=2):
    """States of all cycles and every gradient, for fixed directions."""
    tokens, positions, layout = stream(model.config, PADDING)
    model.zero_grad(set_to_none=True)
    call = (lambda *arguments: blocks(*arguments)) if one_by_one else blocks
    with using(threads):
        rows = blocks.rows(layout)
        states = model.model(tokens, positions, rows, depth, select, call)
        used = [state[: sum(layout.lengths)] for state in states]
        draw = torch.Generator().manual_seed(3)
        total = (used[-1] * torch.randn(used[-1].shape, generator=draw)).sum()
        if early:
            weights = torch.randn(SELECT.numel(), model.config.hidden_size, generator=draw)
            for state in states[:-1]:
                total = total + early * (state.index_select(0, SELECT) * weights).sum()
        total.backward()
    found = {f"state {cycle}": state.detach() for cycle, state in enumerate(used)}
    found |= {f"carries {c}": torch.tensor(s.requires_grad) for c, s in enumerate(states)}
    return found | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_states_and_gradients_are_those_of_the_blocks_one_by_one(changes, dtype):
    model = build_model(preset("test", **{**WIDE, **changes}), seed=1)
    blocks = CppRecurrence(model, dtype)
    blocks.pack()
    config = model.config
    calls = config.H_cycles * (config.L_cycles + 1)
    depths = [Depth.from_bp_steps(config, steps) for steps in range(min(2, calls), calls + 1)]
    for depth in (None, *depths):
        for select in (None, SELECT):
            for threads in (1, 2):
                found = run(blocks, model, depth, select, threads=threads)
                assert_equal(
                    found, run(blocks, model, depth, select, threads=threads, one_by_one=True)
                )


@pytest.mark.parametrize("L_bp_cycles", [(0, 0), (0, 1), (1, 0), (1, 3)])
def test_gradients_of_early_losses_join_those_of_the_last(L_bp_cycles):
    config = preset("test", **WIDE, L_cycles=3)
    model = build_model(config, seed=1)
    blocks = CppRecurrence(model)
    blocks.pack()
    depth = Depth.from_L_bp_cycles(config, L_bp_cycles)
    for select in (None, SELECT):
        found = run(blocks, model, depth, select, early=0.5)
        expected = run(blocks, model, depth, select, early=0.5, one_by_one=True)
        assert found.keys() == expected.keys()
        for name, value in expected.items():  # sums of three may be added up in another order
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_call_without_gradient_between_others_lets_none_through():
    config = preset("test", **WIDE, H_cycles=3, L_cycles=1)
    model = build_model(config, seed=1)
    blocks = CppRecurrence(model)
    blocks.pack()
    depth = Depth(3, 1, (True, True, False, False, True, True))
    found = run(blocks, model, depth)
    assert not found["carries 1"] and found["carries 0"] and found["carries 2"]
    assert "model.embed_tokens.weight" not in found
    assert_equal(found, run(blocks, model, depth, one_by_one=True))
    # With a loss behind the first cycle its calls and the embedding have one again.
    found = run(blocks, model, depth, early=0.5)
    expected = run(blocks, model, depth, early=0.5, one_by_one=True)
    assert "model.embed_tokens.weight" in found
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_padding_gives_zeros_and_gets_no_gradient():
    model = build_model(preset("test", **WIDE), seed=1)
    blocks = CppRecurrence(model)
    blocks.pack()
    tokens, positions, layout = stream(model.config, PADDING)
    last = model.config.vocab_size - 1
    tokens = (tokens % last).index_fill(0, torch.arange(len(tokens))[-PADDING:], last)
    states = model.model(tokens, positions, blocks.rows(layout), None, None, blocks)
    assert all((state[-PADDING:] == 0).all() for state in states)
    sum(state.square().sum() for state in states).backward()
    assert (model.model.embed_tokens.weight.grad[-1] == 0).all()


def test_a_stream_of_one_token_leaves_the_start_of_z_L_as_it_is():
    from hrmtext.batch import RowLayout

    model = build_model(preset("test", **WIDE), seed=1)
    blocks = CppRecurrence(model)
    blocks.pack()
    before = model.model.z_L_init.clone()
    one = torch.zeros(1, dtype=torch.int64)
    rows = blocks.rows(RowLayout.from_prefixes([1], [0]))
    with torch.no_grad():
        model.model(one, one, rows, None, None, blocks)
    assert torch.equal(model.model.z_L_init, before)


def test_positions_beyond_the_models_length_are_turned_as_the_module_turns_them():
    config = preset("test", **WIDE)
    model = build_model(config, seed=1)
    blocks = CppRecurrence(model)
    blocks.pack()
    tokens, positions, layout = stream(config, PADDING)
    far = positions + 2 * config.max_seq_len
    with torch.no_grad():
        found = [
            model.model(tokens, at, blocks.rows(layout), None, SELECT, blocks)[-1]
            for at in (positions, far)
        ]
        one_by_one = model.model(
            tokens, far, blocks.rows(layout), None, SELECT, lambda *args: blocks(*args)
        )
    assert not torch.equal(*found)
    assert torch.equal(found[1], one_by_one[-1])


def test_the_next_step_takes_the_memory_of_the_last():
    model = build_model(preset("test", **WIDE), seed=1)
    blocks = CppRecurrence(model)
    blocks.pack()
    run(blocks, model)
    (kept,) = blocks._free
    with torch.no_grad():  # a validation between them
        tokens, positions, layout = stream(model.config, PADDING)
        model.model(tokens, positions, blocks.rows(layout), None, None, blocks)
    run(blocks, model)
    assert len(blocks._free) == 1 and blocks._free[0].data_ptr() == kept.data_ptr()


@pytest.mark.parametrize("dtype", FORMATS)
def test_looking_inside_a_step_does_not_change_it(dtype):
    """Telemetry calls the blocks one by one, and the weights that follow are the same bits."""

    def weights(every):
        config = small_config(
            model={"preset": "test", **WIDE}, block_kernel="cpp", telemetry_every=every
        )
        compute = build_compute(config, dtype, CPU)
        optimizer = AdamAtan2(compute.shards.parameters.values(), lr=1e-3, ema_decay=0.9)
        step = TrainStep(compute, optimizer, config, CPU)
        batches = iter(MemorySource(random_rows(48, seed=1)).loader(config, 0, 1))
        depth = Depth.from_bp_steps(config.model.resolve(), 5)
        kinds = []
        for number in range(4):
            batch = next(batches)
            result = step.run(batch, depth=depth, lr=1e-3, step=number)
            kinds += [record["kind"] for record in result.records]
        assert kinds.count("telemetry") == (4 // every if every else 0)
        return dict(compute.master.named_parameters())

    assert_equal(weights(2), weights(0))
