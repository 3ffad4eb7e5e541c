"""Batches hold every row once, keep to their budgets, and do not change what is answered."""

import random

import pytest
from generate_helpers import sentences, text_model

from hrmtext.config.generate import GenerateConfig
from hrmtext.generate import runner as runner_module
from hrmtext.generate.batches import MIN_NEAR_ROWS, NEAR_ANSWER_TOKENS, near_tokens, plan_batches
from hrmtext.runtime.device import last_cache_bytes
from hrmtext.runtime.native import compiler


@pytest.mark.parametrize("seed", range(20))
def test_every_row_is_in_one_batch_and_every_batch_in_its_budget(seed):
    rng = random.Random(seed)
    prompts = [rng.randint(1, 300) for _ in range(rng.randint(1, 60))]
    limits = [rng.randint(1, 300) for _ in prompts]
    samples, most = rng.randint(1, 3), rng.randint(1, 4_000)
    near = rng.choice((None, rng.randint(1, 4_000)))
    batches = plan_batches(prompts, limits, samples, most, near)
    assert sorted(row for batch in batches for row in batch) == list(range(len(prompts) * samples))
    for batch in batches:
        owners = [row // samples for row in batch]
        widths = [prompts[owner] + limits[owner] for owner in owners]
        assert len(batch) == 1 or len(batch) * max(widths) <= most
        likely = prompts[owners[0]] + min(limits[owners[0]], NEAR_ANSWER_TOKENS)
        if near is not None and near // likely >= MIN_NEAR_ROWS:
            assert len(batch) * likely <= near


def test_rows_too_long_for_the_cache_are_not_kept_few_for_its_sake():
    assert plan_batches([100] * 40, [28] * 40, 1, 10_000, 128 * MIN_NEAR_ROWS) == [
        list(range(start, min(start + MIN_NEAR_ROWS, 40))) for start in range(0, 40, MIN_NEAR_ROWS)
    ]
    assert len(plan_batches([100] * 40, [28] * 40, 1, 10_000, 128 * MIN_NEAR_ROWS - 1)) == 1


def test_a_cache_that_is_unknown_or_full_of_weights_sets_no_bound():
    assert near_tokens(None, 1_000, 10) is None
    assert near_tokens(1_000, 500, 10) is None
    assert near_tokens(1_000, 300, 10) == 20


def test_the_size_of_the_last_cache_is_plausible_where_the_system_tells_it():
    size = last_cache_bytes()
    assert size is None or 1 << 16 <= size <= 1 << 33


@pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
def test_answers_do_not_depend_on_the_size_of_the_cache(monkeypatch):
    prompts = sentences(20, seed=3)
    found = {}
    for size in (None, 1 << 30, 2 << 20):
        monkeypatch.setattr(runner_module, "last_cache_bytes", lambda size=size: size)
        batches = []
        answers = text_model().generate_tokens(
            prompts,
            config=GenerateConfig(max_new_tokens=5),
            progress=lambda *counts, to=batches: to.append(counts),
        )
        found[size] = [answer.tokens for answer in answers]
        assert (len(batches) > 1) == (size == 2 << 20)
    assert found[None] == found[1 << 30] == found[2 << 20]
