"""Packing: every row once, no bin over its size, slots well used."""

from __future__ import annotations

import time

import numpy as np
import pytest

from hrmtext.data.pack import plan_epoch
from hrmtext.errors import DataError


def check(plan, lengths, bin_tokens, num_bins):
    assert sorted(plan.rows.tolist()) == list(range(len(lengths)))
    assert plan.bins_per_batch == num_bins
    assert len(plan.offsets) == plan.num_batches * num_bins + 1
    sums = np.add.reduceat(np.append(lengths[plan.rows], 0), plan.offsets[:-1])
    sums[np.diff(plan.offsets) == 0] = 0
    assert sums.max(initial=0) <= bin_tokens
    filled = (np.diff(plan.offsets) > 0).reshape(plan.num_batches, num_bins)
    # Filled bins come first, and no batch is empty.
    assert (np.sort(filled, axis=1)[:, ::-1] == filled).all()
    assert filled[:, 0].all()


def test_a_thousand_random_problems_place_every_row_once_and_overfill_nothing():
    generator = np.random.default_rng(0)
    for _ in range(1000):
        bin_tokens = int(generator.integers(1, 300))
        num_bins = int(generator.integers(1, 9))
        batch_tokens = bin_tokens * num_bins + int(generator.integers(0, bin_tokens))
        longest = int(generator.integers(1, bin_tokens + 1))
        lengths = generator.integers(1, longest + 1, size=int(generator.integers(0, 200)))
        plan = plan_epoch(lengths, batch_tokens, bin_tokens)
        check(plan, lengths, bin_tokens, num_bins)


def test_rows_that_never_pair_up_are_carried_but_never_lost():
    lengths = np.full(1001, 60)
    plan = plan_epoch(lengths, 800, 100)
    check(plan, lengths, 100, 8)
    assert plan.num_batches == -(-1001 // 8)


def test_a_carried_row_goes_into_the_next_batch():
    generator = np.random.default_rng(1)
    lengths = generator.integers(1, 90, size=2000)
    plan = plan_epoch(lengths, 400, 100)
    batch_of = np.empty(2000, int)
    for number in range(plan.num_batches):
        batch_of[plan.batch(number)] = number
    # Without carrying, the batch of a row never falls behind that of any later row by over 1.
    latest = np.maximum.accumulate(batch_of)
    assert (latest - batch_of).max() <= 1


@pytest.mark.parametrize("bin_tokens", [None, 24_576, 12_288, 4_096])
def test_a_million_real_looking_rows_use_99_percent_in_seconds(bin_tokens):
    generator = np.random.default_rng(2)
    lengths = np.exp(generator.normal(np.log(135) - 0.5, 1.0, 1_000_000)).astype(int)
    lengths = lengths.clip(4, 4096)
    assert 130 < lengths.mean() < 140
    start = time.perf_counter()
    plan = plan_epoch(lengths, 196_608, bin_tokens)
    assert time.perf_counter() - start < 10
    check(plan, lengths, bin_tokens or 196_608, 1 if bin_tokens is None else 196_608 // bin_tokens)
    assert plan.utilization(lengths) >= 0.99


def test_the_plan_is_deterministic():
    lengths = np.random.default_rng(3).integers(1, 50, 500)
    one, two = plan_epoch(lengths, 400, 100), plan_epoch(lengths.tolist(), 400, 100)
    assert np.array_equal(one.rows, two.rows) and np.array_equal(one.offsets, two.offsets)


def test_rows_that_fit_no_bin_and_bad_sizes_are_refused():
    with pytest.raises(DataError, match="row 1 has 101 input tokens, but a bin holds only 100"):
        plan_epoch([5, 101], 400, 100)
    with pytest.raises(DataError, match="row 2 has no input token"):
        plan_epoch([5, 1, 0], 400)
    with pytest.raises(DataError, match="bin_tokens is 500"):
        plan_epoch([5], 400, 500)
    assert plan_epoch([], 400, 100).num_batches == 0
