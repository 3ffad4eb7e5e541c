"""Rows that are there twice: exactly, or nearly (MinHash, through rensa).

Nothing here depends on the order of rows: of exact duplicates the text is the same, and of rows
alike one is kept by a hash of its text. N rows, P values of a signature, B bands.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hrmtext.errors import BackendError
from hrmtext.runtime.rng import mix64

NUM_VALUES = 128
"""P; the similarity is estimated to about 0.04."""
SHINGLE_WORDS = 5
SEED = 42
BAND_RECALL = 0.99
"""At least this share of pairs at the threshold is compared."""
ROWS_PER_CHUNK = 1 << 14
TEXTS_PER_ADD = 1 << 10

Words = npt.NDArray[np.uint64]


class SeenRows:
    """Remembers texts by 16-byte hashes; 21 to 43 bytes a text, whatever its length."""

    def __init__(self) -> None:
        """Nothing seen yet."""
        self._table = np.zeros((1 << 12, 2), dtype=np.uint64)
        self._count = 0

    def __len__(self) -> int:
        """Different texts."""
        return self._count

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return self._table.nbytes

    def add(self, texts: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Add texts; which of them were new, that is neither added before nor earlier in `texts`.

        Two different texts have the same hash with a probability of N² / 2^129.
        """
        new = [
            self._add(texts[at : at + TEXTS_PER_ADD]) for at in range(0, len(texts), TEXTS_PER_ADD)
        ]
        return np.concatenate(new) if new else np.zeros(0, dtype=bool)

    def _add(self, texts: Sequence[str]) -> npt.NDArray[np.bool_]:
        return self.add_digests(digests_of(texts))

    def add_digests(self, digests: Words) -> npt.NDArray[np.bool_]:
        """The same of (K, 2) `digests_of` texts; K of a few thousand at most."""
        while 4 * (self._count + len(digests)) > 3 * len(self._table):
            self._grow()
        new = _insert(self._table, digests)
        self._count += int(new.sum())
        return new

    def _grow(self) -> None:
        old = self._table[self._table[:, 0] > 0]
        self._table = np.zeros((2 * len(self._table), 2), dtype=np.uint64)
        for at in range(0, len(old), ROWS_PER_CHUNK):
            _insert(self._table, old[at : at + ROWS_PER_CHUNK])


def digests_of(texts: Sequence[str]) -> Words:
    """(K, 2) hashes of texts; the first half is never 0."""
    raw = b"".join(
        hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
        for text in texts
    )
    digests = np.frombuffer(raw, dtype="<u8").reshape(-1, 2).astype(np.uint64)
    digests[:, 0] |= np.uint64(1)  # a free place of a table is 0
    return digests


def _insert(table: Words, digests: Words) -> npt.NDArray[np.bool_]:
    """(K) which digests were not in the open-addressed table; afterwards all are."""
    new = np.zeros(len(digests), dtype=bool)
    waiting = np.arange(len(digests))
    slots = (digests[:, 1] & np.uint64(len(table) - 1)).astype(np.int64)
    while len(waiting):
        there = table[slots]
        free = there[:, 0] == 0
        # Of several that want one free place the first in order gets it; the others look again.
        _, first = np.unique(slots[free], return_index=True)
        winners = np.flatnonzero(free)[first]
        table[slots[winners]] = digests[waiting[winners]]
        new[waiting[winners]] = True
        same = (there == digests[waiting]).all(axis=1) & ~free
        again = ~same
        again[winners] = False
        slots = np.where(free, slots, (slots + 1) % len(table))[again]
        waiting = waiting[again]
    return new


class NearDuplicates:
    """Collects rows' signatures in a file, then tells which rows to drop."""

    def __init__(self, threshold: float, folder: str | Path) -> None:
        """Begin.

        Args:
            threshold: rows count as alike from this estimated Jaccard similarity of their sets of
                5-word pieces on.
            folder: where the file of signatures may lie for a while, 512 bytes a row.
        """
        self.threshold = threshold
        self._signatures = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed in __exit__)
        self._order: list[Words] = []
        self.num_rows = 0
        """Rows added."""

    def __enter__(self) -> NearDuplicates:
        return self

    def __exit__(self, *exception: object) -> None:
        self._signatures.close()

    def add(self, signatures: npt.NDArray[np.uint32], order: Words) -> None:
        """Add rows; their numbers go on from `num_rows`.

        Args:
            signatures: (K, P) `signatures_of` their texts.
            order: (K) `order_of` what tells rows of one text apart when one of them is chosen.
        """
        self._signatures.write(np.ascontiguousarray(signatures, dtype=np.uint32).data)
        self._order.append(order)
        self.num_rows += len(order)

    def drops(self) -> npt.NDArray[np.bool_]:
        """(N) rows to drop: of every group of rows alike all but one.

        In each band the rows with equal values are compared with the one of them that comes first
        by a hash of its text; rows found alike are one group, and its first by that hash stays.
        """
        if not self.num_rows:
            return np.zeros(0, dtype=bool)
        self._signatures.flush()
        shape = (self.num_rows, NUM_VALUES)
        signatures = np.memmap(self._signatures, dtype=np.uint32, mode="r", shape=shape)  # (N, P)
        rank = np.empty(self.num_rows, dtype=np.int64)
        order = np.argsort(np.concatenate(self._order), kind="stable")
        rank[order] = np.arange(self.num_rows)
        leader = np.arange(self.num_rows)  # of each row's group, by rank
        num_bands, width = bands(self.threshold)
        for band in range(num_bands):
            keys = _band_keys(signatures, band * width, width)
            for rows, heads in _candidates(keys, order):
                alike = (signatures[rows] == signatures[heads]).mean(axis=1) >= self.threshold
                for row, head in zip(rows[alike].tolist(), heads[alike].tolist(), strict=True):
                    _join(leader, int(rank[row]), int(rank[head]))
        return (leader != np.arange(self.num_rows))[rank]


def signatures_of(texts: Sequence[str]) -> npt.NDArray[np.uint32]:
    """(K, P) MinHash signatures; BackendError if rensa is not installed."""
    try:
        import rensa
    except ImportError:
        raise BackendError(
            "near duplicates need rensa; install it: pip install 'hrm-text[data]', or set "
            "cleaning.near_duplicates to null"
        ) from None
    minhash: Any = rensa.RMinHash  # pyrefly: ignore[missing-attribute]
    digests = minhash.digests_from_token_sets([shingles(t) for t in texts], NUM_VALUES, SEED)
    return np.array(digests, dtype=np.uint32).reshape(-1, NUM_VALUES)


def order_of(keys: Sequence[str]) -> Words:
    """(K) hashes by which one of several rows alike is chosen."""
    raw = b"".join(hashlib.blake2b(t.encode(), digest_size=8).digest() for t in keys)
    return np.frombuffer(raw, dtype="<u8").astype(np.uint64)


def shingles(text: str) -> list[str]:
    """The text's runs of 5 words, case and spacing aside; all of it where it is shorter."""
    words = text.casefold().split()
    count = max(1, len(words) - SHINGLE_WORDS + 1)
    return [" ".join(words[at : at + SHINGLE_WORDS]) for at in range(count)]


def bands(threshold: float) -> tuple[int, int]:
    """Bands and values a band; the widest with which pairs at the threshold are hardly missed."""
    for width in range(NUM_VALUES, 1, -1):
        count = NUM_VALUES // width
        if 1 - (1 - threshold**width) ** count >= BAND_RECALL:
            return count, width
    return NUM_VALUES, 1


def _band_keys(signatures: npt.NDArray[np.uint32], start: int, width: int) -> Words:
    """(N) one hash of the band's values of each row."""
    keys = np.empty(len(signatures), dtype=np.uint64)
    for at in range(0, len(signatures), ROWS_PER_CHUNK):
        values = signatures[at : at + ROWS_PER_CHUNK, start : start + width].astype(np.uint64)
        key = np.zeros(len(values), dtype=np.uint64)
        for column in values.T:
            key = mix64(key ^ column)
        keys[at : at + ROWS_PER_CHUNK] = key
    return keys


def _candidates(
    keys: Words, order: npt.NDArray[np.int64]
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Rows with a key that others have too, and for each the first of them in `order`."""
    sorted_rows = order[np.argsort(keys[order], kind="stable")]
    sorted_keys = keys[sorted_rows]
    starts = np.concatenate([[True], sorted_keys[1:] != sorted_keys[:-1]])
    head = sorted_rows[np.flatnonzero(starts)[np.cumsum(starts) - 1]]
    which = np.flatnonzero(~starts)
    for at in range(0, len(which), ROWS_PER_CHUNK):
        part = which[at : at + ROWS_PER_CHUNK]
        yield sorted_rows[part], head[part]


def _find(leader: npt.NDArray[np.int64], at: int) -> int:
    while leader[at] != at:
        leader[at] = leader[leader[at]]
        at = int(leader[at])
    return at


def _join(leader: npt.NDArray[np.int64], a: int, b: int) -> None:
    a, b = _find(leader, a), _find(leader, b)
    leader[max(a, b)] = min(a, b)


def near_duplicates(
    batches: Iterable[tuple[Sequence[str], Sequence[str]]], threshold: float, folder: str | Path
) -> npt.NDArray[np.bool_]:
    """`NearDuplicates` of all rows of `batches` (texts and their keys), in their order."""
    with NearDuplicates(threshold, folder) as found:
        for texts, keys in batches:
            found.add(signatures_of(texts), order_of(keys))
        return found.drops()
