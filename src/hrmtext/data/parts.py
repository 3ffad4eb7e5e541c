"""Parts of a file that can be read by themselves: lines in a range of bytes, groups of rows.

Parts in their order hold every row of the file exactly once, wherever they are cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hrmtext.errors import BackendError, DataError

PART_BYTES = 32 << 20
"""About how much of a file one part holds; Parquet counts it uncompressed."""
MIN_PART_BYTES = 2 << 20
"""Below this, a part costs more than it saves."""
MAX_LINE_BYTES = 16 << 20
"""A longer line is no row."""
SKIP_BYTES = 1 << 20


class Part(NamedTuple):
    """JSONL: the lines that begin in bytes `start` to `stop`. Parquet: row groups likewise."""

    start: int
    stop: int


def part_bytes_for(num_bytes: int, num_workers: int) -> int:
    """About how much a part should hold so that `num_workers` share `num_bytes` evenly."""
    # Eight each: the faster one takes over, and the last to finish keeps the others waiting little.
    share = -(-num_bytes // (8 * num_workers))
    return min(PART_BYTES, max(MIN_PART_BYTES, share))


def plan_parts(path: Path, part_bytes: int = PART_BYTES) -> list[Part]:
    """The parts of a JSONL or Parquet file; at least one.

    Raises:
        DataError: a Parquet file that is not whole.
    """
    if path.suffix != ".parquet":
        size = path.stat().st_size
        bounds = [*range(0, max(size, 1), part_bytes), size]
        return [Part(a, b) for a, b in itertools.pairwise(bounds)]
    with open_parquet(path) as file:
        sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
    parts, start, held = [], 0, 0
    for number, size in enumerate(sizes):
        held += size
        if held >= part_bytes:
            parts.append(Part(start, number + 1))
            start, held = number + 1, 0
    if start < len(sizes) or not parts:
        parts.append(Part(start, len(sizes)))
    return parts


def read_lines(path: Path, part: Part | None = None) -> Iterator[bytes | None]:
    """The lines of a file or of a part; None for one longer than MAX_LINE_BYTES."""
    try:
        stream = path.open("rb", buffering=SKIP_BYTES)
    except OSError as error:
        raise DataError(f"could not read {path}: {error.strerror or error}") from error
    with stream:
        start, stop = part or (0, path.stat().st_size)
        at = start
        if start:  # the line that began before belongs to an earlier part
            stream.seek(start - 1)
            at, ended = start - 1, False
            while at < stop and not ended:
                skipped = stream.readline(min(SKIP_BYTES, stop - at))
                at += len(skipped)
                ended = skipped.endswith(b"\n")
                if not skipped:
                    return
            if not ended:
                return
        while at < stop:
            line = stream.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            at += len(line)
            if len(line) <= MAX_LINE_BYTES:
                yield line
                continue
            while line and not line.endswith(b"\n"):
                line = stream.readline(SKIP_BYTES)
                at += len(line)
            yield None


def open_parquet(path: Path) -> Any:
    """A pyarrow ParquetFile that reads a little at a time, not whole columns of a row group.

    Raises:
        DataError: not a whole Parquet file. BackendError: pyarrow is missing.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise BackendError(
            f"{path}: reading Parquet needs pyarrow; install it: pip install 'hrm-text[data]'"
        ) from None
    try:
        return parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a whole Parquet file: {error}") from error
