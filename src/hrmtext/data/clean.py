"""Filters between the sources and the tokenizer; every dropped row is counted by reason."""

from __future__ import annotations

import contextlib
import dataclasses
import filecmp
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from hrmtext.config.data import CleaningConfig
from hrmtext.data.example import COLUMNS, Example, normalize_prompt
from hrmtext.data.format import REPORT_FILE
from hrmtext.data.sources.local import RowProblems, check_text, plain_condition
from hrmtext.errors import DataError
from hrmtext.runtime.io import atomic_folder, write_json

FORMAT_VERSION = 1
SAMPLES_KEPT = 3
SAMPLE_CHARS = 200
ROWS_PER_WRITE = 10_000
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
HELD_OUT = "prompt is held out"


@dataclasses.dataclass(kw_only=True)
class StratumCleaning:
    """What cleaning did to one stratum."""

    kept: int = 0
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    """Rows by reason."""
    samples: dict[str, list[dict[str, str]]] = dataclasses.field(default_factory=dict)
    """The first few rows of each reason, cut short."""
    unreadable: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Rows that the source could not use: reason -> rows and first places."""

    def drop(self, reason: str, example: Example) -> None:
        """Count one row, and keep it as a sample if it is among the first."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        samples = self.samples.setdefault(reason, [])
        if len(samples) < SAMPLES_KEPT:
            cut = [value[:SAMPLE_CHARS].encode(errors="replace").decode() for value in example]
            samples.append(dict(zip(COLUMNS, cut, strict=True)))


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
        """`held_out_prompts` are in the form of `normalize_prompt`."""
        self.config = config
        self.held_out_prompts = held_out_prompts
        self._seen: set[bytes] = set()

    def problem(self, example: Example) -> str | None:
        """Why the row is to be dropped, or None."""
        reason = content_problem(example, self.config)
        if reason is not None:
            return reason
        if self.held_out_prompts and normalize_prompt(example.instruction) in self.held_out_prompts:
            return HELD_OUT
        if self.config.drop_duplicates:
            digest = hashlib.blake2b(repr(tuple(example)).encode(), digest_size=16).digest()
            if digest in self._seen:
                return "exact duplicate"
            self._seen.add(digest)
        return None


def content_problem(example: Example, config: CleaningConfig) -> str | None:
    """What is wrong with a row by itself, or None."""
    if plain_condition(example.condition) is None:
        return "unknown condition"
    checked = check_text(example)
    if isinstance(checked, str):
        return checked
    if not example.instruction or example.instruction.isspace():
        return "empty instruction"
    if len(example.instruction) > config.max_instruction_chars:
        return "instruction too long"
    if len(example.response) > config.max_response_chars:
        return "response too long"
    if config.drop_control_characters and (
        CONTROL.search(example.instruction) or CONTROL.search(example.response)
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
                    kept = []
                    for example in batch:
                        reason = cleaner.problem(example)
                        if reason is None:
                            kept.append(example)
                        else:
                            report.drop(reason, example)
                    report.kept += len(kept)
                    writer.write(kept)
            report.unreadable = stratum.problems.to_mapping()
            if not report.kept:
                (temporary / name).unlink()
            elif (out / name).is_file() and filecmp.cmp(out / name, temporary / name, False):
                before = (out / name).stat()
                os.utime(temporary / name, ns=(before.st_atime_ns, before.st_mtime_ns))
        total = CleaningReport(strata=reports)
        if not total.kept:
            raise DataError(f"no row is left after cleaning; dropped: {total.dropped}")
        write_json(temporary / REPORT_FILE, total.to_mapping())
    return total


class _Writer(Protocol):
    def write(self, rows: list[Example]) -> None: ...


@contextlib.contextmanager
def _writer(path: Path) -> Iterator[_Writer]:
    if path.suffix == ".jsonl":
        with path.open("w", encoding="utf-8") as stream:
            yield _JsonlWriter(stream)
        return
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema([(name, pyarrow.string()) for name in COLUMNS])
    with parquet.ParquetWriter(path, schema, compression="zstd") as file:
        writer = _ParquetWriter(file, schema)
        yield writer
        writer.flush()


class _JsonlWriter:
    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, rows: list[Example]) -> None:
        for row in rows:
            self.stream.write(json.dumps(row._asdict(), ensure_ascii=False) + "\n")


class _ParquetWriter:
    """Collects rows to groups of a fixed size, so that the file does not depend on batching."""

    def __init__(self, file: Any, schema: Any) -> None:
        self.file, self.schema = file, schema
        self.rows: list[Example] = []

    def write(self, rows: list[Example]) -> None:
        self.rows += rows
        while len(self.rows) >= ROWS_PER_WRITE:
            self._put(self.rows[:ROWS_PER_WRITE])
            self.rows = self.rows[ROWS_PER_WRITE:]

    def flush(self) -> None:
        if self.rows:
            self._put(self.rows)
            self.rows = []

    def _put(self, rows: list[Example]) -> None:
        import pyarrow

        columns = [list(column) for column in zip(*rows, strict=True)]
        self.file.write_batch(pyarrow.record_batch(columns, schema=self.schema))
