"""Whole rows for each thread."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence

MOST_UNEVEN = 1.5
"""Times an even share that the thread with most tokens may have."""


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
