"""Which texts a tokenizer is trained on: a seeded sample of every stratum."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hrmtext.data.example import Example
from hrmtext.data.sources.local import RowProblems, find_files, read_batches
from hrmtext.data.workers import Progress

Keys = npt.NDArray[np.uint64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSample:
    """How rows are sampled."""

    max_rows_per_stratum: int | None = None
    """Rows of each stratum; None: no bound."""
    max_rows: int | None = None
    """Rows of all strata together; None: no bound."""
    max_chars: int
    """Characters taken of each text."""
    seed: int = 0


def training_texts(
    folder: str | Path, sample: TextSample, progress: Progress | None = None
) -> Iterator[str]:
    """Instructions and responses for tokenizer training.

    A row is in the sample if its key, a hash of the seed and its text, is among the smallest: of
    its stratum, and of all. So the sample is random, the same on every run, and does not depend on
    the order of rows; with `max_rows` alone neither on how they are split into files. Files are
    read twice, first for the keys; 8 bytes a sampled row are held.
    """
    files = list(find_files(folder).values())
    bounds: list[Keys] = []
    if sample.max_rows_per_stratum is not None or sample.max_rows is not None:
        for number, path in enumerate(files):
            bounds.append(_smallest_keys(path, sample))
            if progress is not None:
                progress("choosing texts for the tokenizer, files", number + 1, len(files))
        if sample.max_rows is not None:
            bounds = _cut(bounds, sample.max_rows)
    for number, path in enumerate(files):
        if not bounds:
            yield from _texts(path, sample, None)
        elif len(bounds[number]):
            yield from _texts(path, sample, bounds[number])
        if progress is not None:
            progress("reading texts for the tokenizer, files", number + 1, len(files))


def row_keys(rows: Sequence[Example], seed: int) -> Keys:
    """(R) keys of rows."""
    salt = f"tokenizer texts {seed}".encode()
    raw = b"".join(
        hashlib.blake2b(
            repr(tuple(row)).encode(errors="surrogatepass"), digest_size=8, key=salt
        ).digest()
        for row in rows
    )
    return np.frombuffer(raw, dtype="<u8").astype(np.uint64)


def _smallest_keys(path: Path, sample: TextSample) -> Keys:
    limit = min(n for n in (sample.max_rows_per_stratum, sample.max_rows) if n is not None)
    held, count = [np.zeros(0, np.uint64)], 0
    for batch in read_batches(path, RowProblems()):
        held.append(row_keys(batch, sample.seed))
        count += len(batch)
        if count > 2 * limit:
            held = [_first(np.concatenate(held), limit)]
            count = limit
    return _first(np.concatenate(held), limit)


def _first(keys: Keys, count: int) -> Keys:
    return np.sort(keys)[:count]


def _cut(keys: list[Keys], count: int) -> list[Keys]:
    """Of each stratum's keys those that are among the `count` smallest of all."""
    everything = np.sort(np.concatenate(keys))
    if len(everything) <= count:
        return keys
    last = everything[count - 1]
    # Rows that are equal have equal keys: which of them are taken is no matter, only how many.
    spare = count - int(np.searchsorted(everything, last, side="left"))
    cut = []
    for values in keys:
        below = values[values < last]
        equal = min(spare, int((values == last).sum()))
        spare -= equal
        cut.append(np.concatenate([below, np.full(equal, last)]))
    return cut


def _texts(path: Path, sample: TextSample, keys: Keys | None) -> Iterator[str]:
    """Texts of the rows that have one of `keys`, the largest of which counts as often as it is."""
    spare = 0 if keys is None else int((keys == keys[-1]).sum())
    for batch in read_batches(path, RowProblems()):
        found = None if keys is None else row_keys(batch, sample.seed)
        for number, row in enumerate(batch):
            if keys is not None and found is not None:
                if found[number] > keys[-1]:
                    continue
                if found[number] == keys[-1]:
                    spare -= 1
                    if spare < 0:
                        continue
            for turn in row.turns():
                yield turn.instruction[: sample.max_chars]
                yield turn.response[: sample.max_chars]
