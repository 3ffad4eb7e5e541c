"""Where the earlier turns of chat rows end, beside the four index arrays of a folder.

The instruction range of a chat row covers everything before its last response, so that a reader
that knows nothing of turns sees a sound row of one prompt. Two further columns, `turn_start` and
`turn_count`, point into `turns.npy`, three numbers a turn: the ends of its prompt and of its
response, counted in tokens from the row's start, and whether the response bears loss.

Letters: R rows, K earlier turns of all rows together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hrmtext.data.arrays import Array
from hrmtext.errors import DataError

TURNS_FILE = "turns.npy"
TURN_START, TURN_COUNT = "turn_start", "turn_count"
TURN_COLUMNS = (TURN_START, TURN_COUNT)
"""int64, one number a row; a row of one turn has count 0."""
FIELDS = 3


@dataclasses.dataclass(frozen=True)
class RowTurns:
    """The earlier turns of R rows; a row without any has one turn."""

    start: Array
    """(R) first of the row's turns in `values`."""
    count: Array
    """(R) turns of the row before its last."""
    values: Array
    """(.., 3) end of prompt, end of response, whether it bears loss."""

    def take(self, which: Array | slice) -> RowTurns:
        """Those of some rows, by index, mask or slice."""
        return RowTurns(self.start[which], self.count[which], self.values)

    def listed(self) -> ListedTurns:
        """All of them, row after row."""
        count = self.count.astype(np.int64)
        rows = np.repeat(np.arange(len(count)), count)  # (K)
        values = self.values[ranges(self.start, count)].astype(np.int64)  # (K, 3)
        prompt_end, response_end = values[:, 0], values[:, 1]
        begin = np.zeros_like(response_end)
        begin[1:] = response_end[:-1]
        begin[np.diff(rows, prepend=-1) != 0] = 0
        return ListedTurns(rows, begin, prompt_end, response_end, values[:, 2] != 0)

    def of_row(self, row: int) -> list[tuple[int, int, bool]]:
        """(end of prompt, end of response, bears loss) of one row's earlier turns."""
        start = int(self.start[row])
        found = self.values[start : start + int(self.count[row])].tolist()
        return [(prompt_end, response_end, bool(flag)) for prompt_end, response_end, flag in found]


@dataclasses.dataclass(frozen=True)
class ListedTurns:
    """K turns; places are counted from the start of their rows."""

    row: Array
    begin: Array
    prompt_end: Array
    response_end: Array
    supervised: Array

    def supervised_tokens(self, num_rows: int) -> Array:
        """(R) response tokens of earlier turns that bear loss."""
        lengths = (self.response_end - self.prompt_end) * self.supervised
        return np.bincount(self.row, weights=lengths, minlength=num_rows).astype(np.int64)

    def unsupervised_tokens(self, num_rows: int) -> Array:
        """(R) response tokens of earlier turns that bear none."""
        lengths = (self.response_end - self.prompt_end) * ~self.supervised
        return np.bincount(self.row, weights=lengths, minlength=num_rows).astype(np.int64)

    def last_prompt(self, num_rows: int) -> Array:
        """(R) where each row's last prompt begins."""
        begin = np.zeros(num_rows, np.int64)
        np.maximum.at(begin, self.row, self.response_end)
        return begin


def turns_of(columns: Mapping[str, Array], values: Array | None) -> RowTurns | None:
    """The turns that a row index's further columns point to; None where no row has several."""
    if values is None or any(name not in columns for name in TURN_COLUMNS):
        return None
    start, count = (columns[name] for name in TURN_COLUMNS)
    return RowTurns(start, count, values) if count.any() else None


def turn_values(values: Array, path: Path) -> Array:
    """`turns.npy` as (.., 3); DataError where it is not three numbers a turn."""
    if len(values) % FIELDS:
        raise DataError(f"{path} has {len(values)} numbers, expected {FIELDS} a turn")
    return values.reshape(-1, FIELDS)


def require_turns(folder: Path, columns: Mapping[str, Array], values: Array | None) -> None:
    """DataError where a row index has only part of what chat rows need."""
    there = [name in columns for name in TURN_COLUMNS]
    if any(there) and not (all(there) and values is not None):
        raise DataError(
            f"{folder} has chat rows, which need {TURNS_FILE} and both of "
            f"{', '.join(f'{name}.npy' for name in TURN_COLUMNS)}; the folder is not whole"
        )


def ranges(starts: Array, counts: Array) -> Array:
    """Concatenation of [start, start + count) over all pairs."""
    starts, counts = starts.astype(np.int64), counts.astype(np.int64)
    offsets = np.repeat(counts.cumsum() - counts, counts)
    return np.repeat(starts, counts) + np.arange(int(counts.sum())) - offsets


def check_turns(folder: Path, turns: RowTurns, inst_len: Array) -> None:
    """Refuse turns that no tokeniser writes.

    Raises:
        DataError: columns beyond `turns.npy`, or ends that do not rise within the row's prompt.
    """
    bad = (turns.start < 0) | (turns.count < 0)
    bad |= turns.start + turns.count > len(turns.values)
    if bad.any():
        raise DataError(
            f"{folder}: row {int(bad.argmax())} points beyond {TURNS_FILE}, which has "
            f"{len(turns.values)} turns: one of the two is truncated or from another run"
        )
    listed = turns.listed()
    rising = (listed.begin < listed.prompt_end) & (listed.prompt_end < listed.response_end)
    rising &= listed.response_end < inst_len[listed.row]
    if not rising.all():
        raise DataError(
            f"{folder}: the turns of row {int(listed.row[int((~rising).argmax())])} do not rise "
            f"within its prompt; {TURNS_FILE} is damaged or from another run"
        )
