"""What the C++ kernels share: how rows are divided among threads."""

import itertools
import random

import pytest

from hrmtext.runtime.native.share import MOST_UNEVEN, circle_shares, even_shares


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_share_whole_rows_evenly_or_not_at_all(threads):
    rng = random.Random(threads)
    for _ in range(200):
        ends = list(itertools.accumulate(rng.randint(1, 30) for _ in range(rng.randint(1, 40))))
        shares = even_shares(ends, threads, 4)
        if shares is None:
            continue
        tokens, rows = shares
        assert len(tokens) == len(rows) == threads + 1
        assert tokens == sorted(tokens) and rows[0] == 0 and rows[-1] == len(ends)
        assert tokens == [ends[row - 1] if row else 0 for row in rows]
        most = max(b - a for a, b in itertools.pairwise(tokens))
        assert most <= MOST_UNEVEN * ends[-1] / threads
    assert (even_shares(list(range(1, 33)), threads, 4) is None) == (threads == 1)
    assert even_shares([3, 103, 105], 2, 4) is None


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_rows_in_a_circle_are_shared_no_less_evenly(threads):
    rng = random.Random(threads)
    gained = 0
    for _ in range(200):
        lengths = [rng.randint(1, 30) for _ in range(rng.randint(1, 40))]
        plain = even_shares(list(itertools.accumulate(lengths)), threads, 4)
        shares = circle_shares(lengths, threads, 4)
        if shares is None:
            assert plain is None
            continue
        first, bounds = shares
        assert bounds == sorted(bounds) and (bounds[0], bounds[-1]) == (0, len(lengths))
        turned = lengths[first:] + lengths[:first]
        most = max(sum(turned[a:b]) for a, b in itertools.pairwise(bounds))
        assert most <= MOST_UNEVEN * sum(lengths) / threads
        if plain is not None:
            before = max(b - a for a, b in itertools.pairwise(plain[0]))
            assert most <= before
            gained += most < before
    assert gained > 20 or threads == 1
    assert circle_shares([], threads, 4) is None
