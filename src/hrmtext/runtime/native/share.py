"""Whole rows for each thread."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence

MOST_UNEVEN = 1.5
"""Times an even share that the thread with most tokens may have."""
EVEN_ENOUGH = 1.005
"""The same below which no better start of a circle is looked for."""
MOST_STARTS = 32
"""Starts of a circle that are tried."""


def even_shares(
    row_ends: Sequence[int], threads: int, least: int
) -> tuple[list[int], list[int]] | None:
    """(threads + 1) tokens and rows at which each thread begins; None: they do not divide well.

    Args:
        row_ends: where each row's tokens end among all.
        least: tokens that each thread should have.
    """
    share = row_ends[-1] / threads
    if threads == 1 or share < least:
        return None
    tokens, rows = [0], [0]
    for thread in range(1, threads + 1):
        wanted = row_ends[-1] * thread / threads
        row = bisect.bisect_left(row_ends, wanted)  # the first that ends there or behind
        before = row_ends[row - 1] if row else 0
        is_nearer = row_ends[row] - wanted <= wanted - before
        rows.append(row + is_nearer)
        tokens.append(row_ends[row] if is_nearer else before)
    if max(b - a for a, b in itertools.pairwise(tokens)) > MOST_UNEVEN * share:
        return None
    return tokens, rows


def circle_shares(lengths: Sequence[int], threads: int, least: int) -> tuple[int, list[int]] | None:
    """The same for rows in a circle, whose start is free: the first row, and (threads + 1) bounds.

    Thread i takes rows bounds[i] to bounds[i + 1], counted from the first row on and from the last
    to row 0. Where one begins decides how near to even cuts between rows can be.
    """
    best, best_largest = None, float("inf")
    for first in range(min(len(lengths), MOST_STARTS)):
        ends = list(itertools.accumulate((*lengths[first:], *lengths[:first])))
        shares = even_shares(ends, threads, least)
        if shares is None:
            continue
        largest = max(b - a for a, b in itertools.pairwise(shares[0]))
        if largest < best_largest:
            best, best_largest = (first, shares[1]), largest
        if largest * threads <= EVEN_ENOUGH * ends[-1]:
            break
    return best
