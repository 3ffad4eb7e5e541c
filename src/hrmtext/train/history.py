"""Running medians: the newest rows of numbers, with robust statistics by column."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

SPREAD_PER_DEVIATION = 1.4826
"""Standard deviation of normal values as a multiple of their median absolute deviation."""
MOST_ROWS = 8
"""Rows to come for which floors are found; the more, the lower they are."""


class History:
    """The newest rows of numbers, with robust statistics by column."""

    def __init__(self, length: int, rows: Sequence[Array] = ()) -> None:
        """Keeps `length` rows; `rows` are the first of them."""
        self.length = length
        self._values = np.empty((0, length))  # (columns, length), NaN where nothing came yet
        self._known = np.zeros(0, dtype=np.int64)  # (columns) values that are no NaN
        self._count = 0
        self._floors: tuple[int, int, Array] | None = None
        for row in rows:
            self.append(row)

    def append(self, row: Array) -> None:
        """Add the newest row, in the place of the oldest where there are `length`."""
        if not self._count:
            self._values = np.full((len(row), self.length), np.nan)
            self._known = np.zeros(len(row), dtype=np.int64)
        oldest = self._values[:, self._count % self.length]
        self._known += np.isnan(oldest)
        self._known -= np.isnan(row)
        oldest[:] = row
        self._count += 1

    def rows(self) -> list[Array]:
        """The rows, oldest first."""
        newest = range(max(0, self._count - self.length), self._count)
        return [self._values[:, index % self.length] for index in newest]

    def statistics(self, at_least: int) -> tuple[Array, Array] | None:
        """Median and spread of every column over its known values; NaN where these are too few.

        None where no column has `at_least` of them.
        """
        counts = self._known
        is_known = counts >= at_least
        if not is_known.any():
            return None
        median = _medians(self._values, counts)
        if not is_known.all():
            median[~is_known] = np.nan
        deviations = np.abs(self._values - median[:, None])
        return median, SPREAD_PER_DEVIATION * _medians(deviations, counts)

    def floors(self, at_least: int) -> Array | None:
        """(columns) what no median of `statistics` is below; None before the first row.

        Found for some rows to come, each of which moves a median by one rank at most. Infinite
        where the median is unknown; -infinite where there are too few values for a bound.
        """
        if not self._count:
            return None
        if self._floors is not None:
            known_for, since, found = self._floors
            if known_for == at_least and self._count - since <= self._renewal(at_least):
                return found
        ranks = (self._known - 1) // 2 - self._renewal(at_least)
        ordered = np.sort(self._values, axis=1)[np.arange(len(ranks)), np.maximum(ranks, 0)]
        found = np.where(self._known == 0, np.inf, np.where(ranks < 0, -np.inf, ordered))
        self._floors = at_least, self._count, found
        return found

    def _renewal(self, at_least: int) -> int:
        """Rows for which floors are found: in so few no unknown column gets known."""
        return min(MOST_ROWS, self.length // 4, at_least - 1)


def _medians(values: Array, counts: npt.NDArray[np.int_]) -> Array:
    """(C, R) -> (C): medians over the first `counts` of each column in order; NaN is last."""
    ordered, least = np.sort(values, axis=1), int(counts.min())
    if least == int(counts.max()) and least:  # all alike, as in nearly every step
        return (ordered[:, (least - 1) // 2] + ordered[:, least // 2]) / 2
    columns = np.arange(len(counts))
    above = np.maximum(counts, 1) // 2
    below = (np.maximum(counts, 1) - 1) // 2
    return (ordered[columns, below] + ordered[columns, above]) / 2
