"""Rows of one stream do not know of each other, and the mask is the prefix mask."""

import pytest
import torch
from model_helpers import gradients, model_in, random_rows, run, run_layout

from hrmtext.batch import RowLayout
from hrmtext.model import Depth
from hrmtext.model.attention.api import ON_EVERY_DEVICE
from hrmtext.model.attention.reference import dense_mask

EACH = pytest.mark.parametrize("backend", ON_EVERY_DEVICE)
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


def prefixes_of(rows):
    return [index % (len(row) + 1) for index, row in enumerate(rows, start=1)]


def by_row(tensor, rows):
    return tensor.split([len(row) for row in rows])


@EACH
@pytest.mark.parametrize("seed", range(4))
def test_packed_rows_equal_separate_rows_in_outputs_and_gradients(backend, seed):
    model = model_in()
    rows = random_rows(6, seed, model.config)
    prefixes = prefixes_of(rows)
    depth = Depth.from_bp_steps(model.config, 5)

    def loss(logits):
        return logits.log_softmax(-1)[:, 3].sum()

    packed = run(model, rows, prefixes, backend=backend, depth=depth).logits
    loss(packed).backward()
    packed_gradients = gradients(model)
    for row, prefix, part in zip(rows, prefixes, by_row(packed, rows), strict=True):
        alone = run(model, [row], [prefix], backend=backend, depth=depth).logits
        torch.testing.assert_close(part, alone, **TOLERANCE)
        loss(alone).backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(packed_gradients[name], grad, **TOLERANCE)


@EACH
def test_a_changed_row_moves_no_other_row(backend):
    model = model_in()
    rows = random_rows(5, 11, model.config)
    prefixes = prefixes_of(rows)
    before = by_row(run(model, rows, prefixes, backend=backend).logits, rows)
    rows[2] = [(token + 1) % model.config.vocab_size for token in rows[2]]
    after = by_row(run(model, rows, prefixes, backend=backend).logits, rows)
    for index in (0, 1, 3, 4):
        assert torch.equal(before[index], after[index])
    assert bool(((before[2] - after[2]).abs().amax(1) > 1e-6).all())


@EACH
@pytest.mark.parametrize("at", [6, 9, 13])
def test_a_changed_response_token_moves_no_earlier_logit_and_all_later_ones(backend, at):
    model, row, prefix = model_in(), list(range(10, 24)), 6
    before = run(model, [row], [prefix], backend=backend).logits
    row[at] = 40
    moved = (run(model, [row], [prefix], backend=backend).logits - before).detach().abs().amax(1)
    assert float(moved[:at].max()) <= 1e-12
    assert float(moved[at:].min()) > 1e-6


@EACH
@pytest.mark.parametrize("at", [0, 3, 5])
def test_a_changed_prompt_token_moves_every_logit_of_its_row(backend, at):
    model, row, prefix = model_in(), list(range(10, 24)), 6
    before = run(model, [row], [prefix], backend=backend).logits
    row[at] = 40
    moved = (run(model, [row], [prefix], backend=backend).logits - before).detach().abs().amax(1)
    assert float(moved.min()) > 1e-6


@EACH
@pytest.mark.parametrize("prefix", [0, 1])
def test_a_row_without_a_longer_prefix_is_causal(backend, prefix):
    model, row = model_in(), list(range(10, 20))
    before = run(model, [row], [prefix], backend=backend).logits
    row[4] = 40
    moved = (run(model, [row], [prefix], backend=backend).logits - before).detach().abs().amax(1)
    assert float(moved[:4].max()) <= 1e-12 and float(moved[4:].min()) > 1e-6


@EACH
def test_padding_behind_the_rows_changes_nothing(backend):
    model = model_in()
    rows = random_rows(4, 3, model.config)
    prefixes = prefixes_of(rows)
    used = sum(map(len, rows))
    found = []
    for num_tokens in (used, used + 17):
        logits = run(model, rows, prefixes, backend=backend, num_tokens=num_tokens).logits
        assert bool(logits.isfinite().all())
        logits[:used].log_softmax(-1)[:, 1].sum().backward()
        found.append((logits[:used].detach(), gradients(model)))
    torch.testing.assert_close(found[0][0], found[1][0], **TOLERANCE)
    for name, grad in found[0][1].items():
        torch.testing.assert_close(grad, found[1][1][name], **TOLERANCE)


LENGTHS, BLOCKS = [14, 5, 9], [[(0, 4), (9, 12)], [(0, 5)], [(2, 6)]]


def test_the_dense_mask_is_the_rule_of_the_project():
    layout = RowLayout.from_blocks(LENGTHS, BLOCKS)
    mask = dense_mask(layout)
    owner = [(row, j) for row, length in enumerate(LENGTHS) for j in range(length)]
    for i, (row_i, at_i) in enumerate(owner):
        for j, (row_j, at_j) in enumerate(owner):
            same_block = any(a <= at_i < b and a <= at_j < b for a, b in BLOCKS[row_i])
            assert bool(mask[i, j]) == (row_i == row_j and (at_j <= at_i or same_block))


@EACH
def test_a_chat_row_sees_each_user_turn_whole_and_nothing_later(backend):
    model = model_in()
    row = list(range(20, 34))
    layout = RowLayout.from_blocks([14], [[(0, 4), (9, 12)]])
    before = run_layout(model, [row], layout, backend=backend).logits
    for at, first_moved in ((3, 0), (6, 6), (11, 9), (12, 12)):
        changed = [*row[:at], 50, *row[at + 1 :]]
        after = run_layout(model, [changed], layout, backend=backend).logits
        moved = (after - before).detach().abs().amax(1)
        assert float(moved[first_moved:].min()) > 1e-6
        assert first_moved == 0 or float(moved[:first_moved].max()) <= 1e-12


@EACH
def test_packed_chat_rows_equal_separate_rows_in_outputs_and_gradients(backend):
    model = model_in()
    rows = [list(range(3, 3 + length)) for length in LENGTHS]
    depth = Depth.from_bp_steps(model.config, 5)

    def loss(logits):
        return logits.log_softmax(-1)[:, 3].sum()

    layout = RowLayout.from_blocks(LENGTHS, BLOCKS)
    packed = run_layout(model, rows, layout, backend=backend, depth=depth).logits
    loss(packed).backward()
    packed_gradients = gradients(model)
    for row, blocks, part in zip(rows, BLOCKS, by_row(packed, rows), strict=True):
        layout = RowLayout.from_blocks([len(row)], [blocks])
        alone = run_layout(model, [row], layout, backend=backend, depth=depth).logits
        torch.testing.assert_close(part, alone, **TOLERANCE)
        loss(alone).backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(packed_gradients[name], grad, **TOLERANCE)


def error_budget(dtype, layout, rows, depth):
    """Errors of both backends against fp64, of logits and of every gradient."""
    wide = model_in(torch.float64)
    narrow = model_in(torch.float64).to(dtype)
    wide.load_state_dict({n: t.double() for n, t in narrow.state_dict().items()})
    results = {}
    for name, model, backend in (
        ("exact", wide, "reference"),
        ("reference", narrow, "reference"),
        ("sdpa", narrow, "sdpa"),
    ):
        logits = run_layout(model, rows, layout, backend=backend, depth=depth).logits
        logits.double().log_softmax(-1)[:, 3].mean().backward()
        tensors = {"logits": logits.detach(), **gradients(model)}
        results[name] = {n: t.double() for n, t in tensors.items() if t is not None}
    return results


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["prefix", "chat"])
def test_sdpa_is_as_close_to_fp64_as_the_reference(dtype, shape):
    rows = [list(range(n)) for n in LENGTHS]
    layout = (
        RowLayout.from_blocks(LENGTHS, BLOCKS)
        if shape == "chat"
        else RowLayout.from_prefixes(LENGTHS, [6, 0, 9])
    )
    depth = Depth.from_bp_steps(model_in().config, 5)
    found = error_budget(dtype, layout, rows, depth)
    assert found["sdpa"].keys() == found["exact"].keys()
    for name, exact in found["exact"].items():
        scale = float(exact.abs().max())
        floor = 4 * torch.finfo(dtype).eps * scale
        reference_error = float((found["reference"][name] - exact).abs().max())
        sdpa_error = float((found["sdpa"][name] - exact).abs().max())
        assert sdpa_error <= 2 * max(reference_error, floor), name
        assert reference_error <= 0.2 * scale, name
