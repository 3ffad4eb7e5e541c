"""Which stack calls carry gradient: against a recurrence written out by hand."""

import pytest
import torch
from model_helpers import gradients, model_in, random_rows, run

from hrmtext.batch import RowLayout
from hrmtext.config import preset
from hrmtext.errors import ConfigError
from hrmtext.model import Depth, bp_steps_at, make_plan
from hrmtext.model.layers import rotary_tables

PREFIXES = [3, 2, 0]


def rows_of(model):
    return [row + [1] * 3 for row in random_rows(3, 7, model.config)]


def loss_of(logits):
    return logits.log_softmax(-1)[:, 5].sum()


def by_hand(model, rows, bp_steps):
    """H_cycles=2, L_cycles=3, one line a stack call, detached as the paper's rule says."""
    config = model.config
    layout = RowLayout.from_prefixes([len(row) for row in rows], PREFIXES)
    plan = make_plan(layout, dtype=torch.float64, backend="reference")
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    cos, sin = rotary_tables(positions, config.head_dim, config.rope_theta, torch.float64)
    tokens = torch.tensor([token for row in rows for token in row])

    def L(x):
        return model.model.L_module(x, cos, sin, plan, 0)

    def H(x):
        return model.model.H_module(x, cos, sin, plan, 0)

    z_H = model.model.embed_tokens(tokens) * config.hidden_size**0.5
    z_L = model.model.z_L_init.expand_as(z_H)
    z_L = L(z_L + z_H).detach()
    z_L = L(z_L + z_H).detach()
    z_L = L(z_L + z_H).detach()
    z_H = H(z_H + z_L)
    if bp_steps < 3:
        z_H = z_H.detach()
    z_L = L(z_L + z_H)
    if bp_steps < 5:
        z_L = z_L.detach()
    z_L = L(z_L + z_H)
    if bp_steps < 4:
        z_L = z_L.detach()
    z_L = L(z_L + z_H)
    z_H = H(z_H + z_L)
    return model.lm_head(z_H)


@pytest.mark.parametrize("bp_steps", [2, 3, 4, 5])
def test_truncated_gradients_equal_the_recurrence_detached_by_hand(bp_steps):
    model = model_in()
    rows = rows_of(model)
    expected = by_hand(model, rows, bp_steps)
    loss_of(expected).backward()
    oracle = gradients(model)
    logits = run(model, rows, PREFIXES, depth=Depth.from_bp_steps(model.config, bp_steps)).logits
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    loss_of(logits).backward()
    for name, grad in gradients(model).items():
        if oracle[name] is None:
            assert grad is None, name
        else:
            torch.testing.assert_close(grad, oracle[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("bp_steps", [2, 3, 4, 5])
def test_neighbouring_depths_have_different_gradients(bp_steps):
    model = model_in()
    rows = rows_of(model)
    found = []
    for steps in (bp_steps, bp_steps + 1):
        depth = Depth.from_bp_steps(model.config, steps)
        loss_of(run(model, rows, PREFIXES, depth=depth).logits).backward()
        # The third backward step is an H call, the fourth to sixth are L calls.
        stack = "H" if bp_steps == 2 else "L"
        found.append(gradients(model)[f"model.{stack}_module.layers.0.mlp.down_proj.weight"])
    assert (found[0] - found[1]).abs().max() > 1e-6


def test_at_two_backward_steps_the_embedding_has_no_gradient():
    model = model_in()
    depth = Depth.from_bp_steps(model.config, 2)
    loss_of(run(model, rows_of(model), PREFIXES, depth=depth).logits).backward()
    assert model.model.embed_tokens.weight.grad is None
    others = [n for n, p in model.named_parameters() if p.grad is None]
    assert others == ["model.embed_tokens.weight"]


def test_full_depth_is_plain_backpropagation():
    model = model_in()
    rows = rows_of(model)
    loss_of(run(model, rows, PREFIXES, depth=Depth.full(model.config)).logits).backward()
    full = gradients(model)
    weight = model.model.L_module.layers[1].mlp.down_proj.weight
    place, step = (3, 4), 1e-6
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[place] += sign * step
            losses.append(loss_of(run(model, rows, PREFIXES).logits))
            weight[place] -= sign * step
    slope = (losses[0] - losses[1]) / (2 * step)
    analytic = full["model.L_module.layers.1.mlp.down_proj.weight"][place]
    torch.testing.assert_close(analytic, slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("bp_steps", "flags"),
    [(2, "00000011"), (3, "00010011"), (4, "00010111"), (5, "00011111"), (8, "11111111")],
)
def test_bp_steps_mark_the_calls_of_the_papers_table(bp_steps, flags):
    depth = Depth.from_bp_steps(preset("XL"), bp_steps)
    assert depth.carries_gradient == tuple(flag == "1" for flag in flags)
    assert depth.num_gradient_calls == bp_steps


@pytest.mark.parametrize(
    ("routing", "flags"),
    [([2], "00110111"), ([0, 3], "00011111"), ([3, 3], "11111111"), ([], "00110011")],
)
def test_L_bp_cycles_mark_the_calls_of_transformers_rule(routing, flags):
    depth = Depth.from_L_bp_cycles(preset("XL"), routing)
    assert depth.carries_gradient == tuple(flag == "1" for flag in flags)


@pytest.mark.parametrize("bp_steps", [1, 9])
def test_impossible_backward_steps_are_refused(bp_steps):
    with pytest.raises(ConfigError, match="expected 2 to 8"):
        Depth.from_bp_steps(preset("XL"), bp_steps)


@pytest.mark.parametrize("routing", [[1, 1, 1], [4], [-1]])
def test_impossible_L_bp_cycles_are_refused(routing):
    with pytest.raises(ConfigError, match="at most 2 entries"):
        Depth.from_L_bp_cycles(preset("XL"), routing)


def test_backward_steps_rise_from_two_to_five_over_the_first_fifth():
    def at(step, total=1_000, ratio=0.2):
        return bp_steps_at(step, total, first=2, last=5, warmup_ratio=ratio)

    assert [at(s) for s in (0, 66, 67, 133, 134, 199, 200, 999, 5_000)] == [
        2, 2, 3, 3, 4, 4, 5, 5, 5,
    ]  # fmt: skip
    assert at(0, ratio=0.0) == 5
    assert at(0, total=0) == 5


def test_fewer_cycles_run_fewer_calls_and_return_their_states():
    model = model_in()
    rows = rows_of(model)
    shallow = Depth(1, 2, (True,) * 3)
    out = run(model, rows, PREFIXES, depth=shallow)
    full = run(model, rows, PREFIXES)
    assert (len(out.states), len(full.states)) == (1, 2)
    assert (out.logits - full.logits).abs().max() > 1e-3
    with pytest.raises(ConfigError, match="KV slots"):
        run(model, rows, PREFIXES, depth=Depth(3, 3, (True,) * 12))
