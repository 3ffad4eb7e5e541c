"""Filters between the sources and the tokenizer; every dropped row is counted by reason."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import filecmp
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from hrmtext.config.data import CleaningConfig
from hrmtext.data.dedup import SeenRows, near_duplicates
from hrmtext.data.example import COLUMNS, HISTORY, Example, example_keys
from hrmtext.data.format import REPORT_FILE
from hrmtext.data.pii import find, mask
from hrmtext.data.rules import apply_rules
from hrmtext.data.sources.local import RowProblems, check_text, plain_condition, read_batches
from hrmtext.errors import DataError
from hrmtext.runtime.io import atomic_folder, write_json

FORMAT_VERSION = 1
SAMPLES_KEPT = 3
SAMPLE_CHARS = 200
ROWS_PER_WRITE = 10_000
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
HELD_OUT = "prompt is held out"
DUPLICATE, NEAR_DUPLICATE = "exact duplicate", "near duplicate"


@dataclasses.dataclass(kw_only=True)
class StratumCleaning:
    """What cleaning did to one stratum."""

    kept: int = 0
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    """Rows by reason."""
    samples: dict[str, list[dict[str, str]]] = dataclasses.field(default_factory=dict)
    """The first few rows of each reason, cut short."""
    changed: dict[str, int] = dataclasses.field(default_factory=dict)
    """Rows kept (before near duplicates go) that the rules changed, by what was done."""
    unreadable: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Rows that the source could not use: reason -> rows and first places."""

    def drop(self, reason: str, example: Example) -> None:
        """Count one row, and keep it as a sample if it is among the first."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        samples = self.samples.setdefault(reason, [])
        if len(samples) < SAMPLES_KEPT:
            row = example.to_mapping()
            if example.history:
                row[HISTORY] = _history_text(example)
            cut = {
                name: value[:SAMPLE_CHARS].encode(errors="replace").decode()
                for name, value in row.items()
            }
            samples.append(cut)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleaningReport:
    """What cleaning did; also `report.json` beside the cleaned rows."""

    strata: dict[str, StratumCleaning]

    @property
    def kept(self) -> int:
        """Rows written."""
        return sum(stratum.kept for stratum in self.strata.values())

    @property
    def dropped(self) -> dict[str, int]:
        """Rows not written, by reason, over all strata; unreadable ones included."""
        total: dict[str, int] = {}
        for stratum in self.strata.values():
            for reason, count in stratum.dropped.items():
                total[reason] = total.get(reason, 0) + count
            for reason, problem in stratum.unreadable.items():
                total[reason] = total.get(reason, 0) + problem["rows"]
        return dict(sorted(total.items()))

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for JSON."""
        strata = {name: dataclasses.asdict(value) for name, value in self.strata.items()}
        return {"kept": self.kept, "dropped": self.dropped, "strata": strata}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceStratum:
    """Rows of one stratum on their way to cleaning."""

    name: str
    """Name without a file's ending."""
    batches: Iterable[list[Example]]
    problems: RowProblems = dataclasses.field(default_factory=RowProblems)
    """Filled while `batches` is read."""


class Cleaner:
    """Decides row by row; remembers the rows it has seen if duplicates are to be dropped."""

    def __init__(
        self, config: CleaningConfig, held_out_prompts: frozenset[str] = frozenset()
    ) -> None:
        """`held_out_prompts` are in the form of `prompt_keys`."""
        self.config = config
        self.held_out_prompts = held_out_prompts
        self._seen = SeenRows()

    def clean(self, batch: list[Example], report: StratumCleaning) -> list[Example]:
        """The rows to keep, as they are to be written; the others go into `report`."""
        kept: list[tuple[Example, collections.Counter[str]]] = []
        for example in batch:
            changed: collections.Counter[str] = collections.Counter()
            result = tidy(example, self.config, changed)
            if isinstance(result, str):
                report.drop(result, self._without_pii(example))
            elif self._is_held_out(result):
                report.drop(HELD_OUT, self._without_pii(example))
            else:
                kept.append((result, changed))
        if self.config.drop_duplicates:
            new = self._seen.add([repr(tuple(row)) for row, _ in kept])
            for (row, _), is_new in zip(kept, new, strict=True):
                if not is_new:
                    report.drop(DUPLICATE, row)
            kept = [item for item, is_new in zip(kept, new, strict=True) if is_new]
        for _, changed in kept:
            for what in changed:
                report.changed[what] = report.changed.get(what, 0) + 1
        report.kept += len(kept)
        return [row for row, _ in kept]

    def _without_pii(self, row: Example) -> Example:
        """What may be shown of a dropped row: personal data that is to go goes from samples too."""
        if self.config.pii == "keep":
            return row
        kinds = self.config.pii_kinds

        def shown(text: str) -> str:
            return mask(text, find(text, kinds))

        return row._replace(
            instruction=shown(row.instruction),
            response=shown(row.response),
            history=tuple(
                turn._replace(instruction=shown(turn.instruction), response=shown(turn.response))
                for turn in row.history
            ),
        )

    def _is_held_out(self, row: Example) -> bool:
        prompts = self.held_out_prompts
        return bool(prompts) and not prompts.isdisjoint(example_keys(row))


def tidy(
    example: Example, config: CleaningConfig, changed: collections.Counter[str] | None = None
) -> Example | str:
    """The row as it is to be written, or why it is to be dropped, seen by itself."""
    result = apply_rules(example, config, collections.Counter() if changed is None else changed)
    return result if isinstance(result, str) else content_problem(result, config) or result


def content_problem(example: Example, config: CleaningConfig) -> str | None:
    """What is wrong with a row by itself, or None."""
    if plain_condition(example.condition) is None:
        return "unknown condition"
    checked = check_text(example)
    if isinstance(checked, str):
        return checked
    for instruction, response, _ in example.turns():
        if not instruction or instruction.isspace():
            return "empty instruction"
        if len(instruction) > config.max_instruction_chars:
            return "instruction too long"
        if len(response) > config.max_response_chars:
            return "response too long"
        if config.drop_control_characters and (
            CONTROL.search(instruction) or CONTROL.search(response)
        ):
            return "control character"
    return None


def clean(
    strata: Iterable[SourceStratum],
    out: str | Path,
    config: CleaningConfig,
    *,
    held_out_prompts: frozenset[str] = frozenset(),
    inputs: str = "",
) -> CleaningReport:
    """Write the good rows of every stratum to `out/<stratum>.<format>`, and `report.json`.

    `out` is swapped for the new folder when that is whole. A file that comes out as it was keeps
    its time of change, so that the tokeniser leaves its stratum alone.

    Args:
        held_out_prompts: normalised prompts that training must not see.
        inputs: put into the completion marker, for callers that skip work already done.

    Raises:
        DataError: two strata of one name, or not one good row. StorageError: the disk is full.
    """
    out = Path(out)
    cleaner = Cleaner(config, held_out_prompts)
    reports: dict[str, StratumCleaning] = {}
    with atomic_folder(
        out, replace=True, format_version=FORMAT_VERSION, inputs=inputs
    ) as temporary:
        for stratum in strata:
            if stratum.name in reports:
                raise DataError(
                    f"two sources give the stratum {stratum.name!r}; set a prefix for one of them"
                )
            report = reports[stratum.name] = StratumCleaning()
            name = f"{stratum.name}.{config.format}"
            with _writer(temporary / name) as writer:
                for batch in stratum.batches:
                    writer.write(cleaner.clean(batch, report))
            report.unreadable = stratum.problems.to_mapping()
        files = {
            f"{name}.{config.format}": report for name, report in reports.items() if report.kept
        }
        if config.near_duplicates is not None:
            _drop_near_duplicates(temporary, files, config.near_duplicates)
        for name in (f"{stratum}.{config.format}" for stratum in reports):
            if name not in files or not files[name].kept:
                (temporary / name).unlink()
            elif (out / name).is_file() and filecmp.cmp(out / name, temporary / name, False):
                before = (out / name).stat()
                os.utime(temporary / name, ns=(before.st_atime_ns, before.st_mtime_ns))
        total = CleaningReport(strata=reports)
        if not total.kept:
            raise DataError(f"no row is left after cleaning; dropped: {total.dropped}")
        write_json(temporary / REPORT_FILE, total.to_mapping())
    return total


def _drop_near_duplicates(
    folder: Path, files: dict[str, StratumCleaning], threshold: float
) -> None:
    """Write the files anew that hold rows like others; which one stays is no matter of order."""

    def batches(name: str) -> Iterator[list[Example]]:
        return read_batches(folder / name, RowProblems(strict=True))

    drop = near_duplicates(
        (
            ([_text(row) for row in batch], [repr(row) for row in batch])
            for name in files
            for batch in batches(name)
        ),
        threshold,
        folder,
    )
    at = 0
    for name, report in files.items():
        which = drop[at : at + report.kept]
        at += len(which)
        if not which.any():
            continue
        number = 0
        with _writer(folder / f".fewer.{name}") as writer:
            for batch in batches(name):
                kept = []
                for row in batch:
                    if which[number]:
                        report.drop(NEAR_DUPLICATE, row)
                    else:
                        kept.append(row)
                    number += 1
                writer.write(kept)
        assert number == len(which), f"{name} has {number} rows, {len(which)} were written"
        report.kept -= int(which.sum())
        (folder / f".fewer.{name}").replace(folder / name)


def _text(row: Example) -> str:
    return "\n".join(text for turn in row.turns() for text in turn[:2])


class _Writer(Protocol):
    def write(self, rows: list[Example]) -> None: ...


@contextlib.contextmanager
def _writer(path: Path) -> Iterator[_Writer]:
    if path.suffix == ".jsonl":
        with path.open("w", encoding="utf-8") as stream:
            yield _JsonlWriter(stream)
        return
    writer = _ParquetWriter(path)
    try:
        yield writer
        writer.flush()
    finally:
        writer.file.close()


class _JsonlWriter:
    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, rows: list[Example]) -> None:
        for row in rows:
            self.stream.write(json.dumps(row.to_mapping(), ensure_ascii=False) + "\n")


class _ParquetWriter:
    """Collects rows to groups of a fixed size, so that the file does not depend on batching.

    The column of earlier turns is there where some row has any: files of pairs have none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Example] = []
        self.has_history = False
        self.file = self._open()

    def write(self, rows: list[Example]) -> None:
        if not self.has_history and any(row.history for row in rows):
            self._widen()
        self.rows += rows
        while len(self.rows) >= ROWS_PER_WRITE:
            self._put(self.rows[:ROWS_PER_WRITE])
            self.rows = self.rows[ROWS_PER_WRITE:]

    def flush(self) -> None:
        if self.rows:
            self._put(self.rows)
            self.rows = []

    def _open(self) -> Any:
        import pyarrow
        from pyarrow import parquet

        names = (*COLUMNS, HISTORY) if self.has_history else COLUMNS
        schema = pyarrow.schema([(name, pyarrow.string()) for name in names])
        return parquet.ParquetWriter(self.path, schema, compression="zstd")

    def _widen(self) -> None:
        """Start the file anew with the further column, empty in the rows written so far."""
        import pyarrow
        from pyarrow import parquet

        self.file.close()
        narrow = self.path.with_name(f".{self.path.name}.narrow")
        self.path.rename(narrow)
        self.has_history = True
        self.file = self._open()
        with parquet.ParquetFile(narrow) as before:
            for number in range(before.num_row_groups):
                group = before.read_row_group(number)
                empty = pyarrow.nulls(group.num_rows, pyarrow.string())
                self.file.write_table(group.append_column(HISTORY, empty))
        narrow.unlink()

    def _put(self, rows: list[Example]) -> None:
        import pyarrow

        columns = [list(column) for column in zip(*rows, strict=True)][: len(COLUMNS)]
        if self.has_history:
            columns.append([_history_text(row) if row.history else None for row in rows])
        schema = self.file.schema
        self.file.write_batch(pyarrow.record_batch(columns, schema=schema))


def _history_text(row: Example) -> str:
    return json.dumps(row.to_mapping()[HISTORY], ensure_ascii=False)
