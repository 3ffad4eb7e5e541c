"""The rows and tokens of all strata, laid end to end on disk, for sampling to draw from."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hrmtext.data.arrays import Array, ArrayWriter, read_chunks
from hrmtext.data.format import (
    EXTRA_NAMES,
    TOKENS_FILE,
    RowIndex,
    Stratum,
)
from hrmtext.data.mixture import RowHasher, Words
from hrmtext.data.turns import FIELDS, TURN_START, TURNS_FILE, turns_of
from hrmtext.errors import DataError
from hrmtext.runtime.rng import mix64

TOKENS_PER_COPY = 1 << 23
ROWS_PER_PIECE = 1 << 19
ROW = np.dtype(
    [
        ("inst_start", "<i8"), ("resp_start", "<i8"), ("inst_len", "<i4"), ("resp_len", "<i4"),
        ("stratum", "<i4"), *((name, "<i8") for name in EXTRA_NAMES),
    ]
)  # fmt: skip
"""One row, with its places in the joint token array and the number of its stratum."""


class Gathered:
    """All tokens (`tokens.npy`, to be kept) and the usable rows of strata (files for a while)."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        """Begin the files in `folder`, for token ids below `vocab_size`."""
        self.vocab_size = vocab_size
        self.names: list[str] = []
        """The strata in the order in which they were added; their places are their numbers."""
        self.num_rows: list[int] = []
        """Usable rows of each."""
        self.num_tokens: list[int] = []
        """Tokens of the usable rows of each."""
        self.extra_names: set[str] = set()
        """Which of `EXTRA_NAMES` some stratum has."""
        self._digest = hashlib.blake2b(digest_size=16)
        self._hasher: RowHasher | None = None
        self._hash_starts: dict[int, int] = {}
        self._starts = [0]
        dtype = np.uint16 if vocab_size <= 1 << 16 else np.int32
        self._tokens = ArrayWriter(folder / TOKENS_FILE, dtype)
        self._folder = folder
        self._turns: ArrayWriter | None = None
        self._paths = [folder / "rows.scratch", folder / "hashes.scratch"]
        self._rows, self._hashes = (path.open("w+b") for path in self._paths)
        self._num_hashes = 0

    def __enter__(self) -> Gathered:
        return self

    def __exit__(self, *exception: Any) -> None:
        for path, stream in zip(self._paths, (self._rows, self._hashes), strict=True):
            with contextlib.suppress(OSError):  # nothing of it is needed any more
                stream.close()
            path.unlink(missing_ok=True)
        self._tokens.__exit__(*exception)
        if self._turns is not None:
            self._turns.__exit__(*exception)

    @property
    def digest(self) -> str:
        """32 hex digits of all tokens and rows added."""
        return self._digest.hexdigest()

    def add(
        self, stratum: Stratum, usable: Callable[[RowIndex], RowIndex], *, by_content: bool
    ) -> None:
        """Append a stratum's tokens, and the rows that `usable` leaves of each piece of its index.

        Args:
            by_content: keep a hash of each row's tokens, of its uncut response.

        Raises:
            DataError: a token beyond the vocabulary.
        """
        number, base = len(self.names), self._tokens.count
        self._copy_tokens(stratum)
        if by_content:
            self._hash_starts[number] = self._num_hashes
        rows = tokens = 0
        digests = [hashlib.blake2b(digest_size=16) for _ in range(4)]
        for at in range(0, stratum.index.num_rows, ROWS_PER_PIECE):
            index = stratum.index.take(slice(at, at + ROWS_PER_PIECE))
            for digest, array in zip(digests, index, strict=True):
                digest.update(np.ascontiguousarray(array).view(np.uint8).data)
            places = np.arange(index.num_rows)
            kept = usable(dataclasses.replace(index, extras={**index.extras, "place": places}))
            if by_content:
                self._add_hashes(stratum, index.take(kept.extras["place"]))
            self._rows.write(self._records(kept, number, base).view(np.uint8).data)
            rows += kept.num_rows
            tokens += kept.num_tokens
        if stratum.turns is not None:
            self._copy_turns(stratum.turns)
        for digest in digests:  # the same tokens cut into rows elsewhere are other data
            self._digest.update(digest.digest())
        self.names.append(stratum.name)
        self.num_rows.append(rows)
        self.num_tokens.append(tokens)
        self._starts.append(self._starts[-1] + rows)

    def pieces(self, strata: Sequence[int], *, by_tokens: bool) -> Iterator[RowPiece]:
        """The usable rows of some strata, in order, a limited number at a time."""
        for number in strata:
            for start in range(0, self.num_rows[number], ROWS_PER_PIECE):
                stop = min(start + ROWS_PER_PIECE, self.num_rows[number])
                yield RowPiece(self, number, start, stop, by_tokens)

    def read_rows(self, number: int, start: int, stop: int) -> Array:
        """(R) records `ROW` of some rows of a stratum."""
        return _read(self._rows, ROW, self._starts[number] + start, stop - start)

    def read_hashes(self, number: int, start: int, stop: int) -> Words:
        """(R) hashes of some rows of a stratum that was added with `by_content`."""
        at = self._hash_starts[number] + start
        return _read(self._hashes, np.dtype(np.uint64), at, stop - start)

    def _copy_tokens(self, stratum: Stratum) -> None:
        for chunk in read_chunks(stratum.tokens, TOKENS_PER_COPY):
            if int(chunk.max()) >= self.vocab_size:
                raise DataError(
                    f"{stratum.folder / TOKENS_FILE} holds token {int(chunk.max())}, but the "
                    f"tokenizer has {self.vocab_size} entries: it is from another tokenizer"
                )
            chunk = chunk.astype(self._tokens.dtype)
            self._digest.update(chunk.data)
            self._tokens.write(chunk)

    def _copy_turns(self, turns: Array) -> None:
        if self._turns is None:
            self._turns = ArrayWriter(self._folder / TURNS_FILE, np.int64)
        for at in range(0, len(turns), ROWS_PER_PIECE):
            values = np.ascontiguousarray(turns[at : at + ROWS_PER_PIECE], dtype=np.int64).ravel()
            self._digest.update(values.data)
            self._turns.write(values)

    def _add_hashes(self, stratum: Stratum, index: RowIndex) -> None:
        self._hasher = self._hasher or RowHasher(self.vocab_size)
        hashes = self._hasher(stratum.tokens, index)
        if (turns := turns_of(index.extras, stratum.turns)) is not None:
            # Two rows of the same tokens are two rows where they learn other answers.
            listed = turns.listed()
            learnt = listed.response_end * 2 + listed.supervised
            np.bitwise_xor.at(hashes, listed.row, mix64(learnt.astype(np.uint64)))
        self._hashes.write(hashes.view(np.uint8).data)
        self._num_hashes += len(hashes)

    def _records(self, index: RowIndex, number: int, base: int) -> Array:
        records = np.zeros(index.num_rows, dtype=ROW)
        records["inst_start"] = index.inst_start + base
        records["resp_start"] = index.resp_start + base
        records["inst_len"] = index.inst_len
        records["resp_len"] = index.resp_len
        records["stratum"] = number
        for name in EXTRA_NAMES:
            if name in index.extras:
                records[name] = index.extras[name]
                self.extra_names.add(name)
        if self._turns is not None and TURN_START in index.extras:
            records[TURN_START] += self._turns.count // FIELDS
        return records


@dataclasses.dataclass(frozen=True)
class RowPiece:
    """Some usable rows of one stratum; read when asked for."""

    gathered: Gathered
    stratum: int
    start: int
    stop: int
    by_tokens: bool
    """Rows are told apart by their tokens and count by them; else by their place, and count 1."""

    def rows(self) -> Array:
        """(R) records `ROW`."""
        return self.gathered.read_rows(self.stratum, self.start, self.stop)

    def identities(self) -> Words:
        """(R) hash of each row's tokens, or its place in the stratum."""
        if self.by_tokens:
            return self.gathered.read_hashes(self.stratum, self.start, self.stop)
        return np.arange(self.start, self.stop, dtype=np.uint64)

    def sizes(self) -> Array:
        """(R) tokens of each row, or 1."""
        if not self.by_tokens:
            return np.ones(self.stop - self.start, dtype=np.int64)
        return num_tokens(self.rows())


def num_tokens(records: Array) -> Array:
    """(R) prompt and response tokens of each record, int64."""
    return records["inst_len"].astype(np.int64) + records["resp_len"]


def _read(stream: Any, dtype: np.dtype[Any], start: int, count: int) -> Array:
    stream.flush()
    stream.seek(start * dtype.itemsize)
    records = np.fromfile(stream, dtype=dtype, count=count)
    assert len(records) == count, f"{count} records asked for, {len(records)} there"
    return records
