"""Writes one tokenised stratum, or a part of one, piece by piece."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hrmtext.data.arrays import Array, ArrayWriter, open_array, read_chunks
from hrmtext.data.example import Example, Turn
from hrmtext.data.format import INDEX_NAMES, TOKENS_FILE
from hrmtext.data.parts import Part
from hrmtext.data.sources.local import RowProblems, read_batches
from hrmtext.data.tokenizer import PromptTokenizer
from hrmtext.data.turns import FIELDS, TURN_COLUMNS, TURN_COUNT, TURN_START, TURNS_FILE

VALUES_PER_COPY = 1 << 22


class StratumWriter:
    """Rows laid end to end: prompt, response, prompt, response, ...; little of it in memory.

    The files of earlier turns (see `hrmtext.data.turns`) are there where some row has any.
    """

    def __init__(self, folder: Path) -> None:
        """Begin the files in `folder`."""
        self.dropped: dict[str, Any] = {}
        """Reason -> dropped rows, as the caller counts them."""
        self._folder = folder
        self._files = contextlib.ExitStack()
        self._tokens = self._open(TOKENS_FILE, np.uint32)
        self._columns = [self._open(f"{name}.npy", np.uint64) for name in INDEX_NAMES]
        self._turns: ArrayWriter | None = None
        self._turn_columns: list[ArrayWriter] = []

    def __enter__(self) -> StratumWriter:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._files.__exit__(*exception)

    @property
    def num_rows(self) -> int:
        """Rows written."""
        return self._columns[0].count

    @property
    def num_tokens(self) -> int:
        """Tokens written."""
        return self._tokens.count

    @property
    def num_earlier_turns(self) -> int:
        """Turns written that are not the last of their rows."""
        return 0 if self._turns is None else self._turns.count // FIELDS

    def add_rows(
        self,
        source: Path,
        tokenizer: PromptTokenizer,
        problems: RowProblems,
        part: Part | None = None,
    ) -> None:
        """Tokenise a file or a part of it."""
        for batch in read_batches(source, problems, part):
            conditions, instructions, responses, histories = zip(*batch, strict=True)
            has_turns = any(histories)
            if has_turns:
                conditions, instructions, responses = _turn_texts(batch)
            tokens, lengths = tokenizer.encode_rows(conditions, instructions, responses)
            sizes = np.array(lengths, dtype=np.uint64).reshape(-1, 2)  # of prompts and responses
            if has_turns:
                sizes = self._set_turns_aside(sizes, histories)
            elif self._turns is not None:
                self._add_turns(np.zeros(len(batch), np.int64), np.empty(0, np.int64))
            ends = np.cumsum(sizes).reshape(-1, 2) + np.uint64(self.num_tokens)
            starts = ends - sizes
            self._tokens.write(np.frombuffer(tokens, dtype=np.uint32))
            columns = (starts[:, 0], sizes[:, 0], starts[:, 1], sizes[:, 1])
            for writer, column in zip(self._columns, columns, strict=True):
                writer.write(column)

    def add_part(self, folder: Path) -> None:
        """Append a part that was written the same way."""
        self._add_part_turns(folder)
        base = np.uint64(self.num_tokens)
        for name, writer in zip(INDEX_NAMES, self._columns, strict=True):
            shift = base if name.endswith("_start") else np.uint64(0)
            for chunk in read_chunks(open_array(folder / f"{name}.npy"), VALUES_PER_COPY):
                writer.write(chunk + shift)
        for chunk in read_chunks(open_array(folder / TOKENS_FILE), VALUES_PER_COPY):
            self._tokens.write(chunk)

    def _open(self, name: str, dtype: Any) -> ArrayWriter:
        return self._files.enter_context(ArrayWriter(self._folder / name, dtype))

    def _set_turns_aside(self, sizes: Array, histories: Sequence[tuple[Turn, ...]]) -> Array:
        """(turns, 2) lengths -> (R, 2) those of the rows, whose prompts reach to the last answer.

        Where the earlier turns end, and whether their answers bear loss, is written.
        """
        counts = np.array([len(history) for history in histories], dtype=np.int64)  # (R)
        ends = np.cumsum(sizes.astype(np.int64)).reshape(-1, 2)  # (turns, 2)
        last = np.cumsum(counts + 1) - 1  # (R) each row's last turn
        starts = np.concatenate(([0], ends[last[:-1], 1]))  # (R)
        is_last = np.zeros(len(ends), bool)
        is_last[last] = True
        train = np.array([turn.train for history in histories for turn in history], np.int64)
        earlier = ends[~is_last] - np.repeat(starts, counts)[:, None]
        self._add_turns(counts, np.column_stack((earlier, train)).ravel())
        rows = np.column_stack((ends[last, 0] - starts, ends[last, 1] - ends[last, 0]))
        return rows.astype(np.uint64)

    def _add_turns(self, counts: Array, values: Array) -> None:
        """Write how many earlier turns the next rows have, and `FIELDS` numbers of each turn."""
        turns = self._open_turns()
        columns = {
            TURN_START: np.cumsum(counts) - counts + self.num_earlier_turns,
            TURN_COUNT: counts,
        }
        for name, writer in zip(TURN_COLUMNS, self._turn_columns, strict=True):
            writer.write(columns[name])
        turns.write(values)

    def _open_turns(self) -> ArrayWriter:
        """The file of turns; begun, if it is not yet, for the rows before, which have one turn."""
        if self._turns is None:
            self._turns = self._open(TURNS_FILE, np.int64)
            self._turn_columns = [self._open(f"{name}.npy", np.int64) for name in TURN_COLUMNS]
            for writer in self._turn_columns:
                for at in range(0, self.num_rows, VALUES_PER_COPY):
                    count = min(VALUES_PER_COPY, self.num_rows - at)
                    writer.write(np.zeros(count, np.int64))
        return self._turns

    def _add_part_turns(self, folder: Path) -> None:
        """Append the turns of a part; call it before its rows are appended."""
        if not (folder / TURNS_FILE).is_file():
            if self._turns is not None:
                num_rows = len(open_array(folder / f"{INDEX_NAMES[0]}.npy"))
                self._add_turns(np.zeros(num_rows, np.int64), np.empty(0, np.int64))
            return
        turns = self._open_turns()
        shifts = {TURN_START: self.num_earlier_turns, TURN_COUNT: 0}
        for name, writer in zip(TURN_COLUMNS, self._turn_columns, strict=True):
            for chunk in read_chunks(open_array(folder / f"{name}.npy"), VALUES_PER_COPY):
                writer.write(chunk + shifts[name])
        for chunk in read_chunks(open_array(folder / TURNS_FILE), VALUES_PER_COPY):
            turns.write(chunk)


def _turn_texts(batch: list[Example]) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Conditions, instructions and responses of all turns, row after row."""
    turns = [(row.condition, *turn) for row in batch for turn in row.turns()]
    conditions, instructions, responses, _ = zip(*turns, strict=True)
    return conditions, instructions, responses
