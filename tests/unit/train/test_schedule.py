"""Schedules: right at the corners, sane at and past the end, whatever the settings."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_source import small_config

from hrmtext.model.depth import Depth
from hrmtext.train.schedule import depth_at, learning_rate


def test_the_published_recipe_warms_up_then_stays_constant():
    config = small_config(lr=2.2e-4, warmup_steps=2000)
    assert learning_rate(0, config, 305_000) == pytest.approx(1.1e-7)
    assert learning_rate(999, config, 305_000) == pytest.approx(1.1e-4)
    for step in (1999, 2000, 150_000, 304_999, 305_000, 10**9):
        assert learning_rate(step, config, 305_000) == pytest.approx(2.2e-4)


def test_the_cosine_ends_at_its_minimum_and_stays_there():
    config = small_config(lr=1.0, warmup_steps=10, lr_min_ratio=0.1)
    assert learning_rate(10, config, 110) == pytest.approx(1.0)
    assert learning_rate(60, config, 110) == pytest.approx(0.55)
    assert learning_rate(85, config, 110) == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(0.5)) / 2)
    for step in (110, 111, 10**9):
        assert learning_rate(step, config, 110) == pytest.approx(0.1)


@settings(max_examples=200, deadline=None)
@given(
    step=st.integers(0, 10_000),
    warmup=st.integers(0, 2_000),
    total=st.integers(1, 5_000),
    ratio=st.floats(0, 1),
)
def test_the_rate_is_finite_within_bounds_and_unimodal(step, warmup, total, ratio):
    config = small_config(lr=0.5, warmup_steps=warmup, lr_min_ratio=ratio)
    now, following = (learning_rate(s, config, total) for s in (step, step + 1))
    assert 0 <= now <= 0.5 + 1e-12
    if step + 1 < warmup:
        assert following > now
    elif step >= warmup:
        assert following <= now + 1e-12
        assert now >= 0.5 * ratio - 1e-12


def test_the_backward_depth_grows_from_first_to_last_over_its_share():
    config = small_config(bp_first=2, bp_last=5, bp_warmup_ratio=0.2)
    model = config.model.resolve()
    depths = [depth_at(s, config, model, 1000).num_gradient_calls for s in range(1200)]
    assert depths[0] == 2
    assert depths == sorted(depths)
    assert [depths.index(k) for k in (3, 4, 5)] == [67, 134, 200]
    assert set(depths[200:]) == {5}


def test_a_fixed_list_of_L_cycles_overrides_the_depth_warmup():
    config = small_config(L_bp_cycles=[1, 3])
    model = config.model.resolve()
    assert depth_at(0, config, model, 10) == Depth.from_L_bp_cycles(model, [1, 3])
    assert depth_at(9, config, model, 10).num_gradient_calls == 6
