"""Which rows an epoch takes: sources, and endless walks through their rows in random order.

A walk is one random order of a source's rows after another (laps). It goes on from epoch to epoch,
so that later epochs see new rows first. The order of a lap is that of a key for each row, scrambled
from what identifies the row; an epoch's stretch is then all rows with keys between two cuts, and
nothing has to be sorted or held but the few rows near a cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hrmtext.data.arrays import Array
from hrmtext.data.format import RowIndex, row_tokens
from hrmtext.runtime.rng import keyed_seed, mix64, numpy_generator

BIN_BITS = 12
"""A cut is first sought among 2**12 ranges of keys, then among the rows of one of them."""
TOKENS_PER_HASH = 1 << 20
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2**64

Words = npt.NDArray[np.uint64]


class Piece(Protocol):
    """Some rows of a source, in the source's order."""

    def identities(self) -> Words:
        """(R) what the random order depends on: equal rows may share one."""
        ...

    def sizes(self) -> Array:
        """(R) how far each row carries the walk: 1, or its tokens."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """A place in a walk."""

    lap: int
    key: int = 0
    """Rows of this lap with a smaller key lie before the cut."""
    ties: int = 0
    """So do this many of the rows with this very key, the first ones."""

    @property
    def at_start(self) -> bool:
        """Whether no row of the lap lies before the cut."""
        return self.key == 0 and self.ties == 0


class Walk:
    """The endless walk through a source."""

    def __init__(
        self, seed: int, name: str, pieces: Callable[[], Iterator[Any]], length: int
    ) -> None:
        """Args:
        seed, name: what the random orders depend on, beside the rows' identities.
        pieces: all rows of the source, always in the same order.
        length: sizes of all rows together.
        """
        self.seed, self.name, self.length = seed, name, length
        self._pieces = pieces

    def cut(self, at: int) -> Cut:
        """Where `at` units of the walk are over; a row lies before it if its first unit does."""
        lap, offset = divmod(at, self.length)
        if offset == 0:
            return Cut(lap=lap)
        totals = np.zeros(1 << BIN_BITS, dtype=np.int64)
        for piece in self._pieces():
            bins = self._keys(piece, lap) >> np.uint64(64 - BIN_BITS)
            # Sums of integers below 2**53, so exact.
            sums = np.bincount(bins.astype(np.int64), piece.sizes(), minlength=1 << BIN_BITS)
            totals += sums.astype(np.int64)
        ends = np.cumsum(totals)
        chosen = int(np.searchsorted(ends, offset))  # the first range that ends at or behind it
        keys, sizes = [], []
        for piece in self._pieces():
            all_keys = self._keys(piece, lap)
            inside = all_keys >> np.uint64(64 - BIN_BITS) == chosen
            keys.append(all_keys[inside])
            sizes.append(piece.sizes()[inside])
        near, size = np.concatenate(keys), np.concatenate(sizes)
        order = np.argsort(near, kind="stable")
        near, size = near[order], size[order]
        starts = np.cumsum(size) - size + int(ends[chosen] - totals[chosen])
        before = int(np.searchsorted(starts, offset))
        if before == len(near):  # the cut lies behind the range's last row
            last = near[-1]
            return Cut(lap=lap, key=int(last), ties=int((near == last).sum()))
        ties = before - int(np.searchsorted(near, near[before]))
        return Cut(lap=lap, key=int(near[before]), ties=ties)

    def between(self, start: Cut, stop: Cut) -> Iterator[tuple[Any, int, Array | None]]:
        """Piece, lap, and the rows of the piece that lie between two cuts; None: all of them."""
        seen = {"start": 0, "stop": 0}
        laps = range(start.lap, stop.lap + (not stop.at_start))
        for piece in self._pieces():
            for lap in laps:
                from_start = lap != start.lap or start.at_start
                to_end = lap != stop.lap
                if from_start and to_end:
                    yield piece, lap, None
                    continue
                keys = self._keys(piece, lap)
                chosen = np.ones(len(keys), dtype=bool)
                if not from_start:
                    chosen &= ~_before(start, keys, seen, "start")
                if not to_end:
                    chosen &= _before(stop, keys, seen, "stop")
                yield piece, lap, np.flatnonzero(chosen)

    def _keys(self, piece: Piece, lap: int) -> Words:
        salt = np.uint64(keyed_seed(self.seed, "walk", self.name, lap))
        return mix64(piece.identities() ^ salt)


def _before(cut: Cut, keys: Words, seen: dict[str, int], side: str) -> npt.NDArray[np.bool_]:
    """(R) rows before a cut; `seen` counts rows with the cut's own key over all pieces."""
    before = keys < np.uint64(cut.key)
    if cut.ties:
        equal = np.flatnonzero(keys == np.uint64(cut.key))
        before[equal[: max(0, cut.ties - seen[side])]] = True
        seen[side] += len(equal)
    return before


class RowHasher:
    """64-bit hashes of rows' tokens: equal rows get equal ones wherever they lie."""

    def __init__(self, vocab_size: int) -> None:
        """Prepare for token ids below `vocab_size`."""
        self._words = numpy_generator(0, "row hash").integers(
            0, 1 << 64, size=vocab_size, dtype=np.uint64
        )
        powers = np.empty(TOKENS_PER_HASH, dtype=np.uint64)
        powers[0] = 1
        powers[1:] = _MULTIPLIER
        self._powers = np.multiply.accumulate(powers)
        powers[1:] = pow(_MULTIPLIER, -1, 1 << 64)
        self._inverses = np.multiply.accumulate(powers)

    def __call__(self, tokens: Array, index: RowIndex) -> Words:
        """(R) a polynomial over each row's tokens, every token first replaced by a random word."""
        lengths = index.inst_len + index.resp_len
        hashes = np.empty(index.num_rows, dtype=np.uint64)
        ends = np.cumsum(lengths)
        at = 0
        while at < index.num_rows:
            done = int(ends[at - 1]) if at else 0
            stop = int(np.searchsorted(ends, done + TOKENS_PER_HASH, side="right"))
            stop = max(stop, at + 1)
            values = row_tokens(tokens, index.take(slice(at, stop)))
            hashes[at:stop] = self._hash(values, ends[at:stop] - lengths[at:stop] - done)
            at = stop
        return mix64(hashes ^ mix64(index.inst_len.astype(np.uint64)))

    def _hash(self, values: Array, starts: Array) -> Words:
        if len(values) > len(self._powers):  # one row longer than a chunk: chunk by chunk
            total, scale = np.uint64(0), np.uint64(1)
            step = np.uint64(pow(_MULTIPLIER, len(self._powers), 1 << 64))
            with np.errstate(over="ignore"):
                for at in range(0, len(values), len(self._powers)):
                    part = self._hash(values[at : at + len(self._powers)], np.zeros(1, np.int64))
                    total += part[0] * scale
                    scale *= step
            return np.array([total])
        words = self._words[values]
        words *= self._powers[: len(words)]
        return np.add.reduceat(words, starts) * self._inverses[starts]
