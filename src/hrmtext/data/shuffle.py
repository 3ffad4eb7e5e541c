"""Shuffling more rows than memory holds: random buckets on disk, each shuffled by itself.

Every row goes to a bucket drawn at random, and every bucket is put into a random order: together a
uniformly random order of all rows. It depends on the key and on the order in which rows are added,
not on how many are added at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hrmtext.runtime.rng import keyed_seed, mix64, numpy_generator

ROWS_PER_BUCKET = 1 << 21
MAX_BUCKETS = 256
"""Each is an open file."""
ROWS_PER_FLUSH = 1 << 19

Records = npt.NDArray[Any]


class Shuffle:
    """Takes records of one type, then gives them back in random order, in pieces."""

    def __init__(
        self,
        folder: Path,
        dtype: npt.DTypeLike,
        num_rows: int,
        seed: int,
        *key: str | int,
        rows_per_bucket: int = ROWS_PER_BUCKET,
    ) -> None:
        """Prepare to take about `num_rows` rows.

        Args:
            folder: for files; it must exist. Nothing is written if one bucket holds all rows.
            seed, key: what the order depends on, beside `num_rows`.
        """
        self.dtype = np.dtype(dtype)
        self._seed, self._key = seed, key
        self._salt = np.uint64(keyed_seed(seed, "bucket", *key))
        self._num_buckets = max(1, min(MAX_BUCKETS, -(-num_rows // rows_per_bucket)))
        self._paths = [folder / f"bucket-{number}" for number in range(self._num_buckets)]
        self._pending: list[Records] = []
        self._num_pending = 0
        self._counts = np.zeros(self._num_buckets, dtype=np.int64)
        self._files = contextlib.ExitStack()
        self._streams: list[Any] = []

    def __enter__(self) -> Shuffle:
        if self._num_buckets > 1:
            self._streams = [
                self._files.enter_context(path.open("wb", buffering=0)) for path in self._paths
            ]
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.close()
        for path in self._paths:
            path.unlink(missing_ok=True)

    def add(self, records: Records) -> None:
        """Take more rows; the array must not be changed afterwards."""
        self._pending.append(records)
        self._num_pending += len(records)
        if self._num_buckets > 1 and self._num_pending >= ROWS_PER_FLUSH:
            self._flush()

    def __iter__(self) -> Iterator[Records]:
        """All rows in their new order, a bucket at a time."""
        if self._num_buckets > 1:
            self._flush()
            self._files.close()
        for number, path in enumerate(self._paths):
            if self._num_buckets > 1:
                records = np.fromfile(path, dtype=self.dtype)
                path.unlink()
            else:
                records = self._join()
            order = numpy_generator(self._seed, *self._key, number).permutation(len(records))
            yield records[order]

    def _join(self) -> Records:
        records = np.concatenate([np.empty(0, self.dtype), *self._pending])
        self._pending, self._num_pending = [], 0
        return records

    def _flush(self) -> None:
        records = self._join()
        at = int(self._counts.sum())
        numbers = np.arange(at, at + len(records), dtype=np.uint64)
        # The upper half of a random word, scaled: a bucket drawn at random.
        draws = mix64(numbers ^ self._salt) >> np.uint64(32)
        buckets = (draws * np.uint64(self._num_buckets) >> np.uint64(32)).astype(np.uint16)
        grouped = records[np.argsort(buckets, kind="stable")]
        counts = np.bincount(buckets, minlength=self._num_buckets)
        self._counts += counts
        start = 0
        for stream, count in zip(self._streams, counts.tolist(), strict=True):
            _write_all(stream, grouped[start : start + count])
            start += count


def _write_all(stream: Any, records: Records) -> None:
    data = records.view(np.uint8).data
    while len(data):  # an unbuffered file may take less than it is given
        data = data[stream.write(data) :]
