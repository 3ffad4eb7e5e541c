"""Files of cleaned rows: written row by row, and joined from parts without a look at each row.

A block is a piece of such a file as it is stored: a record batch of Parquet, or lines of JSONL.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, Self

from hrmtext.data.arrays import Array
from hrmtext.data.example import COLUMNS, HISTORY, Example
from hrmtext.data.parts import open_parquet
from hrmtext.data.sources.local import check_row

ROWS_PER_GROUP = 10_000
"""Rows of a group of a Parquet file."""
ROWS_PER_BLOCK = 2_000

Block = Any


class RowWriter(Protocol):
    """Takes rows; a context manager."""

    def write(self, rows: list[Example]) -> None:
        """Append rows."""
        ...


@contextlib.contextmanager
def row_writer(path: Path) -> Iterator[RowWriter]:
    """Write a part's rows to a .jsonl or .parquet file; the latter always has a history column."""
    if path.suffix == ".jsonl":
        with path.open("w", encoding="utf-8") as stream:
            yield _JsonlRows(stream)
    else:
        with JoinedFile(path, with_history=True) as file:
            yield _ParquetRows(file)


def read_blocks(path: Path) -> Iterator[Block]:
    """The blocks of a file, of at most ROWS_PER_BLOCK rows each."""
    if path.suffix == ".jsonl":
        with path.open("rb") as stream:
            while lines := list(itertools.islice(stream, ROWS_PER_BLOCK)):
                yield lines
    else:
        with open_parquet(path) as file:
            yield from file.iter_batches(batch_size=ROWS_PER_BLOCK)


def block_row(block: Block, number: int) -> Example:
    """One row of a block."""
    if isinstance(block, list):
        row = json.loads(block[number])
    else:
        row = block.slice(number, 1).to_pylist()[0]
    example = check_row(row)
    assert isinstance(example, Example), f"a cleaned row cannot be read back: {example}"
    return example


def block_with(block: Block, keep: Array) -> Block:
    """The rows of a block where `keep` is true."""
    if isinstance(block, list):
        return list(itertools.compress(block, keep.tolist()))
    import pyarrow

    return block.filter(pyarrow.array(keep))


def any_history(block: Block) -> bool:
    """Whether any row of a block has earlier turns."""
    if isinstance(block, list):
        return True  # JSONL says it row by row, so that nothing hangs on it
    column = block.column(HISTORY)
    return column.null_count < len(column)


class JoinedFile:
    """Writes blocks to one file, whose bytes do not depend on how rows were cut into blocks."""

    def __init__(self, path: Path, *, with_history: bool) -> None:
        """`with_history`: whether a Parquet file has the column of earlier turns."""
        self._columns = (*COLUMNS, HISTORY) if with_history else COLUMNS
        self._held: list[Any] = []
        self._num_held = 0
        self._stream: Any = None
        if path.suffix == ".jsonl":
            self._stream = path.open("wb")
            return
        import pyarrow
        from pyarrow import parquet

        self._schema = pyarrow.schema([(name, pyarrow.string()) for name in self._columns])
        self._file = parquet.ParquetWriter(path, self._schema, compression="zstd")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._stream is not None:
            self._stream.close()
            return
        try:
            if kind is None and self._num_held:
                self._put(self._num_held)
        finally:
            self._file.close()

    def write(self, block: Block) -> None:
        """Append a block."""
        if self._stream is not None:
            self._stream.writelines(block)
            return
        self._held.append(block.select(self._columns))
        self._num_held += block.num_rows
        while self._num_held >= ROWS_PER_GROUP:
            self._put(ROWS_PER_GROUP)

    def _put(self, count: int) -> None:
        import pyarrow

        table = pyarrow.Table.from_batches(self._held, self._schema)
        group = table.slice(0, count).combine_chunks()
        self._file.write_table(group, row_group_size=count)
        rest = table.slice(count)
        self._held = rest.to_batches() if rest.num_rows else []
        self._num_held -= count


class _JsonlRows:
    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, rows: list[Example]) -> None:
        for row in rows:
            self.stream.write(json.dumps(row.to_mapping(), ensure_ascii=False) + "\n")


class _ParquetRows:
    def __init__(self, file: JoinedFile) -> None:
        self.file = file

    def write(self, rows: list[Example]) -> None:
        if not rows:
            return
        import pyarrow

        columns = [list(column) for column in zip(*rows, strict=True)][: len(COLUMNS)]
        columns.append([history_text(row) if row.history else None for row in rows])
        arrays = [pyarrow.array(column, pyarrow.string()) for column in columns]
        self.file.write(pyarrow.record_batch(arrays, names=[*COLUMNS, HISTORY]))


def history_text(row: Example) -> str:
    """Earlier turns as JSON text, as Parquet files hold them."""
    return json.dumps(row.to_mapping()[HISTORY], ensure_ascii=False)
