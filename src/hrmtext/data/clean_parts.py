"""Cleaning as tasks: each part of a file by itself, then each stratum joined from its parts.

A part is a folder: the rows kept so far, and of each of them what decides later whether another
row of any part is the same. Between the two, the driver compares all parts and writes a code a row.
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from hrmtext.config.base import build, to_mapping
from hrmtext.config.data import CleaningConfig
from hrmtext.data.arrays import Array, ArrayWriter, open_array, read_chunks, save_array
from hrmtext.data.clean_rows import Cleaner, StratumCleaning
from hrmtext.data.dedup import NUM_VALUES, NearDuplicates, SeenRows, digests_of, order_of
from hrmtext.data.dedup import signatures_of as signatures_of_texts
from hrmtext.data.example import Example
from hrmtext.data.parts import Part
from hrmtext.data.row_files import (
    Block,
    JoinedFile,
    any_history,
    block_row,
    block_with,
    read_blocks,
    row_writer,
)
from hrmtext.data.sources.local import RowProblems, read_batches
from hrmtext.errors import CheckpointError
from hrmtext.runtime.io import atomic_folder, require_complete

DIGESTS_FILE, SIGNATURES_FILE, ORDER_FILE = "digests.npy", "signatures.npy", "order.npy"
CHANGES_FILE = "changes.npy"
CODES_FILE = "codes.npy"
KEPT, DUPLICATE_CODE, NEAR_CODE = 0, 1, 2
DUPLICATE, NEAR_DUPLICATE = "exact duplicate", "near duplicate"
REASONS = {DUPLICATE_CODE: DUPLICATE, NEAR_CODE: NEAR_DUPLICATE}
SEEN_BYTES = 1 << 30
"""About how much memory the comparison of exact duplicates may take."""
BYTES_PER_SEEN_ROW = 43
ROWS_PER_LOOK = 1 << 12


def part_request(
    config: CleaningConfig,
    source: Path,
    part: Part,
    folder: Path,
    *,
    strict: bool,
    held_out: Path | None,
    key: list[Any],
) -> dict[str, Any]:
    """The task of cleaning one part of a file.

    Args:
        held_out: JSON list of prompts that training must not see.
        key: a part that an earlier run has left counts if it was made with the same.
    """
    return {
        "task": "clean",
        "what": f"cleaning {source}",
        "source": str(source),
        "part": list(part),
        "folder": str(folder),
        "strict": strict,
        "config": to_mapping(config),
        "held_out": None if held_out is None else str(held_out),
        "key": key,
    }


def answer(request: dict[str, Any]) -> Any:
    """Do one task of cleaning; the counts of a stratum if that was joined."""
    if "join" in request:
        return _join(request)
    folder = Path(request["folder"])
    with contextlib.suppress(CheckpointError):
        if require_complete(folder)["key"] == request["key"]:
            return None
    config = build(CleaningConfig, request["config"], where="a cleaning task")
    held_out = frozenset[str]()
    if request["held_out"] is not None:
        path = Path(request["held_out"])
        held_out = _load_prompts(path.resolve(), path.stat().st_mtime_ns)
    problems = RowProblems(strict=request["strict"])
    batches = read_batches(Path(request["source"]), problems, Part(*request["part"]))
    clean_part(batches, problems, folder, Cleaner(config, held_out), request["key"])
    return None


@lru_cache(maxsize=1)
def _load_prompts(path: Path, mtime_ns: int) -> frozenset[str]:
    return frozenset(json.loads(path.read_text(encoding="utf-8")))


def clean_part(
    batches: Iterable[list[Example]],
    problems: RowProblems,
    folder: Path,
    cleaner: Cleaner,
    key: Any = None,
) -> None:
    """Write the part's folder, whole or not at all; little of it is held in memory."""
    config, report = cleaner.config, StratumCleaning()
    sets: dict[frozenset[str], int] = {}
    has_history = False
    marker: dict[str, Any] = {"key": key}
    with atomic_folder(folder, replace=True, late=marker) as temporary, _Columns(temporary) as put:
        with row_writer(temporary / f"rows.{config.format}") as writer:
            for batch in batches:
                kept = cleaner.clean(batch, report)
                rows = [row for row, _ in kept]
                report.kept += len(rows)
                has_history = has_history or any(row.history for row in rows)
                writer.write(rows)
                numbers = [sets.setdefault(changes, len(sets)) for _, changes in kept]
                put(CHANGES_FILE, np.array(numbers, dtype=np.uint32))
                if config.drop_duplicates:
                    put(DIGESTS_FILE, digests_of([repr(tuple(row)) for row in rows]).ravel())
                if config.near_duplicates is not None and rows:
                    signatures = signatures_of_texts([_text(row) for row in rows])
                    put(SIGNATURES_FILE, signatures.ravel())
                    put(ORDER_FILE, order_of([repr(row) for row in rows]))
        report.unreadable = problems.to_mapping()
        marker |= {
            "num_read": problems.num_read,
            "report": report.to_mapping(),
            "changes": [sorted(changes) for changes in sets],
            "has_history": has_history,
        }


class _Columns:
    """One-dimensional files of a part, begun when there is something to write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = contextlib.ExitStack()
        self.writers: dict[str, ArrayWriter] = {}

    def __enter__(self) -> _Columns:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.files.__exit__(*exception)

    def __call__(self, name: str, values: Array) -> None:
        if name not in self.writers:
            writer = ArrayWriter(self.folder / name, values.dtype)
            self.writers[name] = self.files.enter_context(writer)
        self.writers[name].write(values)


def _text(row: Example) -> str:
    return "\n".join(text for turn in row.turns() for text in turn[:2])


def mark_duplicates(parts: Sequence[Path], seen_bytes: int = SEEN_BYTES) -> None:
    """Give a code to every row of `parts` that an earlier one, of any part, equals.

    Rows are looked at in as many passes as memory demands, each over a share of all hashes.
    """
    total = sum(require_complete(part)["report"]["kept"] for part in parts)
    passes = max(1, -(-total * BYTES_PER_SEEN_ROW // seen_bytes))
    for number in range(passes):
        seen = SeenRows()
        for part in parts:
            if not (part / DIGESTS_FILE).is_file():
                continue
            found = [np.zeros(0, dtype=bool)]
            for chunk in read_chunks(open_array(part / DIGESTS_FILE), 2 * ROWS_PER_LOOK):
                digests = chunk.reshape(-1, 2)
                old = np.zeros(len(digests), dtype=bool)
                mine = np.flatnonzero(digests[:, 1] % np.uint64(passes) == number)
                old[mine] = ~seen.add_digests(digests[mine])
                found.append(old)
            add_codes(part, np.concatenate(found), DUPLICATE_CODE)


def mark_near_duplicates(parts: Sequence[Path], threshold: float, folder: Path) -> None:
    """Give a code to all but one of the rows alike, of those that have none yet."""
    places = []
    with NearDuplicates(threshold, folder) as found:
        for part in parts:
            if not (part / ORDER_FILE).is_file():
                continue
            order = np.concatenate([*read_chunks(open_array(part / ORDER_FILE), ROWS_PER_LOOK)])
            left = np.flatnonzero(codes_of(part, len(order)) == KEPT)
            at = 0
            values = open_array(part / SIGNATURES_FILE)
            for chunk in read_chunks(values, NUM_VALUES * ROWS_PER_LOOK):
                signatures = chunk.reshape(-1, NUM_VALUES)
                which = left[(left >= at) & (left < at + len(signatures))]
                found.add(signatures[which - at], order[which])
                at += len(signatures)
            places.append((part, len(order), left))
        drops = found.drops()
    at = 0
    for part, count, left in places:
        codes = np.zeros(count, dtype=bool)
        codes[left] = drops[at : at + len(left)]
        at += len(left)
        add_codes(part, codes, NEAR_CODE)


def codes_of(part: Path, count: int) -> Array:
    """(count) codes of the rows of a part."""
    path = part.with_suffix(f".{CODES_FILE}")
    return np.array(open_array(path)) if path.is_file() else np.zeros(count, dtype=np.uint8)


def add_codes(part: Path, which: Array, code: int) -> None:
    """Set the code of some rows of a part; nothing is written where there are none."""
    if which.any():
        codes = codes_of(part, len(which))
        codes[which] = code
        save_array(part.with_suffix(f".{CODES_FILE}"), codes)


def _join(request: dict[str, Any]) -> dict[str, Any]:
    """Write a stratum's file from the rows of its parts that are left; its counts.

    A file that comes out as it was keeps its time of change, so that the tokeniser leaves its
    stratum alone.
    """
    out, before = Path(request["out"]), Path(request["before"])
    parts = [Path(part) for part in request["join"]]
    report, num_read = StratumCleaning(), 0
    markers = [require_complete(part) for part in parts]
    for marker in markers:
        report.add(StratumCleaning(**marker["report"]), num_read)
        num_read += marker["num_read"]
    rows = [part / f"rows{out.suffix}" for part in parts]
    codes = [
        codes_of(part, marker["report"]["kept"])
        for part, marker in zip(parts, markers, strict=True)
    ]
    report.kept = sum(int((values == KEPT).sum()) for values in codes)
    for marker, part, values in zip(markers, parts, codes, strict=True):
        _count_changes(report, marker["changes"], part, values)
    with_history = any(
        any_history(block)
        for marker, path, values in zip(markers, rows, codes, strict=True)
        if marker["has_history"]
        for block in _left(path, values)
    )
    with JoinedFile(out, with_history=with_history) as file:
        for path, values in zip(rows, codes, strict=True):
            for block in _left(path, values, report):
                file.write(block)
    if not report.kept:
        out.unlink()
    elif before.is_file() and filecmp.cmp(before, out, shallow=False):
        stat = before.stat()
        os.utime(out, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return report.to_mapping()


def _left(path: Path, codes: Array, report: StratumCleaning | None = None) -> Iterator[Block]:
    """Blocks of the rows of a part that are left; the others are counted in `report`."""
    at = 0
    for block in read_blocks(path):
        values = codes[at : at + len(block)]
        at += len(block)
        if report is not None:
            for number in np.flatnonzero(values).tolist():
                report.drop(REASONS[int(values[number])], block_row(block, number))
        yield block_with(block, values == KEPT) if values.any() else block
    assert at == len(codes), f"{path} has {at} rows, {len(codes)} were written"


def _count_changes(
    report: StratumCleaning, sets: Sequence[Sequence[str]], part: Path, codes: Array
) -> None:
    """Count what the rules changed in the rows that are no exact duplicates."""
    if not any(sets):
        return
    numbers = open_array(part / CHANGES_FILE)
    counts = np.bincount(numbers[codes != DUPLICATE_CODE], minlength=len(sets))
    for changes, count in zip(sets, counts.tolist(), strict=True):
        if count:
            for what in changes:
                report.changed[what] = report.changed.get(what, 0) + count
