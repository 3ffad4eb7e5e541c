"""Sequences of n tokens that some texts hold, found again in a corpus of tokens, exactly.

A rolling hash of every place of the corpus picks candidates; their tokens are compared, so what is
reported as found is there. Letters: T tokens of a piece of the corpus, S n-grams, C candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from hrmtext.data.arrays import Array
from hrmtext.data.format import RowIndex, row_tokens
from hrmtext.errors import DataError
from hrmtext.runtime.rng import keyed_seed

TOKENS_PER_CHUNK = 1 << 20
ROWS_PER_CHUNK = 1 << 16
SLOTS_PER_NGRAM = 16
"""Of the table that most places of the corpus are dismissed by."""

Words = npt.NDArray[np.uint64]


class Ngrams:
    """The distinct n-grams of some texts of tokens."""

    def __init__(self, texts: Sequence[Sequence[int]], size: int) -> None:
        """Hash every n-gram of `size` tokens that lies within a text.

        Raises:
            DataError: `size` below 1.
        """
        if size < 1:
            raise DataError(f"n-grams of {size} tokens; expected at least 1")
        self.size = size
        lengths = np.array([len(text) for text in texts], dtype=np.int64)
        self.bounds = np.concatenate([[0], np.cumsum(lengths)])
        """(texts + 1) where each text starts in `tokens`."""
        self.tokens = np.array([token for text in texts for token in text], dtype=np.uint64)
        starts = np.arange(len(self.tokens))
        self.starts = starts[_fits(starts, self.bounds, size)]
        """Where an n-gram starts in `tokens`, in order."""
        self._hash_all()

    def _hash_all(self) -> None:
        for attempt in range(8):
            self._base = np.uint64(keyed_seed(attempt, "n-gram") * 2 + 1)
            hashes = rolling_hash(self.tokens, self.size, self._base)[self.starts]
            self._hashes, first, self.ids = np.unique(
                hashes, return_index=True, return_inverse=True
            )
            self._first = self.starts[first] if len(self.starts) else self.starts
            if self._hashes_are_distinct():
                break
        else:
            raise AssertionError("eight bases in a row gave two n-grams one hash")
        bits = max(16, (SLOTS_PER_NGRAM * max(1, len(self._hashes)) - 1).bit_length())
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(1 << bits, dtype=bool)
        self._table[self._hashes >> self._shift] = True

    def __len__(self) -> int:
        """S, the distinct n-grams; they are numbered from 0, `ids` gives those of `starts`."""
        return len(self._hashes)

    def find(self, tokens: Words, bounds: Array) -> tuple[Array, Array]:
        """Every place where one of the n-grams lies within a segment.

        Args:
            tokens: (T) ids.
            bounds: where segments end in `tokens`, ascending, the last at T.

        Returns:
            (C) places in `tokens`, ascending, and (C) numbers of the n-grams there.
        """
        if not len(self) or len(tokens) < self.size:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        hashes = rolling_hash(tokens, self.size, self._base)
        places = np.flatnonzero(self._table[hashes >> self._shift])
        hashes = hashes[places]
        numbers = np.minimum(np.searchsorted(self._hashes, hashes), len(self) - 1)
        same = self._hashes[numbers] == hashes
        places, numbers = places[same], numbers[same]
        inside = _fits(places, bounds, self.size)
        places, numbers = places[inside], numbers[inside]
        same = _equal(tokens, places, self.tokens, self._first[numbers], self.size)
        return places[same], numbers[same]

    def coverage(self, found: npt.NDArray[np.bool_]) -> tuple[Array, Array]:
        """(texts) tokens of each text inside an n-gram of `found` (S), and (texts) its tokens."""
        change = np.zeros(len(self.tokens) + 1, dtype=np.int64)
        starts = self.starts[found[self.ids]] if len(self) else self.starts[:0]
        np.add.at(change, starts, 1)
        np.add.at(change, starts + self.size, -1)
        covered = np.concatenate([[0], np.cumsum(np.cumsum(change[:-1]) > 0)])
        return covered[self.bounds[1:]] - covered[self.bounds[:-1]], np.diff(self.bounds)

    def _hashes_are_distinct(self) -> bool:
        first = self._first[self.ids] if len(self.starts) else self.starts
        return bool(_equal(self.tokens, self.starts, self.tokens, first, self.size).all())


def rolling_hash(tokens: Words, size: int, base: np.uint64) -> Words:
    """(T - size + 1) hash of the `size` tokens from each place on; 64 bits, a polynomial in `base`.

    Hashes of 1, 2, 4, ... tokens are doubled and put together: log2(size) passes over the tokens.
    """
    if len(tokens) < size:
        return np.empty(0, np.uint64)
    block, width = tokens, 1
    whole: Words | None = None
    covered = 0
    while True:
        if size & width:
            if whole is None:
                whole = block
            else:
                count = len(tokens) - width - covered + 1
                whole = block[:count] * _power(base, covered) + whole[width : width + count]
            covered += width
        if covered == size:
            assert whole is not None, "a size has at least one bit"
            return whole
        count = len(block) - width
        block = block[:count] * _power(base, width) + block[width : width + count]
        width *= 2


def row_segments(
    tokens: Array, index: RowIndex, chunk: int = TOKENS_PER_CHUNK
) -> Iterator[tuple[Words, Array, int]]:
    """The tokens of rows, about `chunk` at a time.

    Yields:
        (T) tokens: prompt, response, prompt, ... of some rows; where each of them ends; and the
        number of the first of these rows. Segment s is of row `first + s // 2`.
    """
    for at in range(0, index.num_rows, ROWS_PER_CHUNK):
        part = index.take(slice(at, at + ROWS_PER_CHUNK))
        ends = np.cumsum(part.inst_len + part.resp_len)
        start = 0
        while start < part.num_rows:
            before = int(ends[start - 1]) if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, before + chunk, side="right")))
            rows = part.take(slice(start, stop))
            lengths = np.stack([rows.inst_len, rows.resp_len], axis=1).ravel()
            yield row_tokens(tokens, rows).astype(np.uint64), np.cumsum(lengths), at + start
            start = stop


def rows_with_ngrams(tokens: Array, index: RowIndex, ngrams: Ngrams) -> npt.NDArray[np.bool_]:
    """(R) whether a prompt or a response holds one of the n-grams."""
    found = np.zeros(index.num_rows, dtype=bool)
    for values, bounds, first in row_segments(tokens, index):
        places, _ = ngrams.find(values, bounds)
        found[first + np.searchsorted(bounds, places, side="right") // 2] = True
    return found


def _fits(places: Array, bounds: Array, size: int) -> npt.NDArray[np.bool_]:
    """Whether `size` tokens from each place on end within the segment that the place lies in."""
    if not len(places):
        return np.empty(0, dtype=bool)
    return bounds[np.searchsorted(bounds, places, side="right")] >= places + size


def _equal(
    a: Words, places_a: Array, b: Words, places_b: Array, size: int
) -> npt.NDArray[np.bool_]:
    """(C) whether `size` tokens from each place of `a` and of `b` on are the same."""
    same = np.ones(len(places_a), dtype=bool)
    for offset in range(size):
        same &= a[places_a + offset] == b[places_b + offset]
    return same


def _power(base: np.uint64, exponent: int) -> np.uint64:
    return np.uint64(pow(int(base), exponent, 1 << 64))
