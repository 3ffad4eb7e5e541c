"""A public source's examples on disk: raw rows through its rule into one JSONL file a stratum."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hrmtext.config.base import build, to_mapping
from hrmtext.config.data import HubSourceConfig
from hrmtext.data.clean_rows import add_places
from hrmtext.data.engine import Engine, LocalEngine
from hrmtext.data.example import Example
from hrmtext.data.format import REPORT_FILE, read_json
from hrmtext.data.sources.files import (
    RawRows,
    is_archive,
    locate,
    matching_files,
    read_rows,
    source_files,
)
from hrmtext.data.sources.hub import HubUnit, hub_rows, hub_units
from hrmtext.data.sources.local import RowProblems, check_text, plain_condition
from hrmtext.data.sources.recipe.catalog import find_source
from hrmtext.data.sources.source import Origin, Source
from hrmtext.data.workers import Progress
from hrmtext.errors import CheckpointError, ConfigError, DataError
from hrmtext.runtime.io import (
    atomic_folder,
    explain_storage_errors,
    fingerprint,
    require_complete,
    write_json,
)

FORMAT_VERSION = 2
ROWS_HELD = 20_000
"""Examples held in memory before they are appended to their files."""
MAX_TASKS = 64
"""Tasks that one source's files are divided among."""
MAX_NAME_BYTES = 200
_ENCODE = json.JSONEncoder(ensure_ascii=False).encode


@dataclasses.dataclass(kw_only=True)
class SourceReport:
    """What became of a source's raw rows; also `report.json` beside the examples."""

    source: str
    rows: int = 0
    """Raw rows read, the malformed ones not counted."""
    examples: int = 0
    left_out: RowProblems = dataclasses.field(default_factory=RowProblems)
    """What the rule leaves out, by reason."""
    problems: RowProblems = dataclasses.field(default_factory=RowProblems)
    """Rows that are wrong, by reason."""
    columns_seen: set[str] = dataclasses.field(default_factory=set)
    """Columns that at least one row has."""

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "source": self.source,
            "rows": self.rows,
            "examples": self.examples,
            "left_out": self.left_out.to_mapping(),
            "problems": self.problems.to_mapping(),
        }


def collect_inputs(config: HubSourceConfig) -> str:
    """What the examples of a source depend on; files by name, size and time of change.

    Raises:
        ConfigError: unknown source, or one without a Hub id and without a path.
        DataError: the path holds none of its files.
    """
    source = find_source(config.source)
    values = to_mapping(config)
    values.pop("eval_size")
    parts: list[Any] = [FORMAT_VERSION, values]
    for root in _roots(source, config):
        for path in matching_files(source, root):
            stat = path.stat()
            parts.append([str(path), stat.st_size, stat.st_mtime_ns])
    return fingerprint(*parts)


def collect(
    config: HubSourceConfig,
    out: str | Path,
    progress: Progress | None = None,
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Write `out/<stratum>.jsonl` and `report.json`, unless they are up to date; the report.

    The source's files (or Hub configs) are read by tasks, each over some of them; an interrupted
    run goes on from the tasks that are done, which lie beside `out` for a while.

    Args:
        out: the source's folder; swapped for the new one when that is whole.
        engine: where tasks run; None: in this process.

    Raises:
        ConfigError, DataError, BackendError: as `collect_inputs`, `read_rows` and `hub_rows` do;
            not one example; a malformed row if `strict`.
    """
    out = Path(out)
    inputs = collect_inputs(config)
    try:
        if require_complete(out).get("inputs") == inputs:
            return read_json(out / REPORT_FILE)
    except CheckpointError:
        pass
    source = find_source(config.source)
    roots = _roots(source, config)
    files = [path for root in roots for path in matching_files(source, root)]
    count = len(files) if roots else len(_hub_units(source, config))
    # Members of an archive are read one after another, by one task.
    num_tasks = 1 if any(map(is_archive, files)) else min(count, MAX_TASKS)
    bounds = [index * count // num_tasks for index in range(num_tasks + 1)]
    work = out.with_name(f".{out.name}.parts")
    with explain_storage_errors(work):
        work.mkdir(parents=True, exist_ok=True)
    folders = [work / f"{start:06}" for start in bounds[:-1]]
    common = {"task": "collect", "what": f"reading {source.name}", "config": to_mapping(config)}
    requests = [
        common
        | {
            "units": [start, stop] if num_tasks > 1 else None,
            "folder": str(folder),
            "key": [inputs, start, stop],
        }
        for folder, (start, stop) in zip(folders, itertools.pairwise(bounds), strict=True)
    ]
    done = 0

    def advance(index: int) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(f"reading {source.name}", done, num_tasks)

    num_bytes = sum(path.stat().st_size for path in files)
    with contextlib.ExitStack() as stack:
        if engine is None:
            engine = stack.enter_context(LocalEngine(1))
        engine.require(written=[work], read=roots)
        engine.ask(requests, advance, num_bytes=num_bytes)
    report = _join(source, folders, out, inputs)
    shutil.rmtree(work)
    return report


def answer(request: dict[str, Any]) -> None:
    """Do one task: put the examples of some units into a folder, unless an earlier run has."""
    folder = Path(request["folder"])
    with contextlib.suppress(CheckpointError):
        if require_complete(folder)["key"] == request["key"]:
            return
    config = build(HubSourceConfig, request["config"], where="a task")
    source = find_source(config.source)
    report = SourceReport(source=source.name, problems=RowProblems(strict=config.strict))
    marker: dict[str, Any] = {"key": request["key"]}
    with atomic_folder(folder, replace=True, late=marker) as temporary:
        writer = _StrataWriter(temporary)
        for origin, rows in _units(source, config, report.problems, request["units"]):
            for stratum, example in convert(source, origin, rows, report):
                writer.add(stratum, example)
        writer.flush()
        marker |= {"report": report.to_mapping(), "columns_seen": sorted(report.columns_seen)}


def _join(source: Source, parts: Sequence[Path], out: Path, inputs: str) -> dict[str, Any]:
    """Put the parts' files together, stratum by stratum; the report."""
    report: dict[str, Any] = {"source": source.name, "rows": 0, "examples": 0}
    left_out: dict[str, dict[str, Any]] = {}
    problems: dict[str, dict[str, Any]] = {}
    columns: set[str] = set()
    with atomic_folder(out, replace=True, inputs=inputs) as temporary:
        for part in parts:
            marker = require_complete(part)
            for name in ("rows", "examples"):
                report[name] += marker["report"][name]
            add_places(left_out, marker["report"]["left_out"], 0)
            add_places(problems, marker["report"]["problems"], 0)
            columns.update(marker["columns_seen"])
            for path in sorted(part.glob("*.jsonl")):
                with path.open("rb") as stream, (temporary / path.name).open("ab") as joined:
                    shutil.copyfileobj(stream, joined, 1 << 20)
        report |= {
            "left_out": dict(sorted(left_out.items())),
            "problems": dict(sorted(problems.items())),
        }
        _require_columns_seen(source, columns, report["rows"])
        if not report["examples"]:
            counts = [
                {reason: found["rows"] for reason, found in reasons.items()}
                for reasons in (left_out, problems)
            ]
            raise DataError(
                f"source {source.name} gave no example of {report['rows']:,} rows; left out: "
                f"{counts[0]}, wrong: {counts[1]}"
            )
        write_json(temporary / REPORT_FILE, report)
    return report


def convert(
    source: Source, origin: Origin, rows: RawRows, report: SourceReport
) -> Iterator[tuple[str, Example]]:
    """Stratum and example of every raw row that the rule takes; the rest is counted in `report`.

    Raises:
        DataError: a wrong row, if the report's problems are strict.
    """
    for place, row in rows:
        report.rows += 1
        if not isinstance(row, dict):
            report.problems.add("not a JSON object", place)
            continue
        report.columns_seen.update(row.keys() & source.columns.keys())
        for name in source.nullable:
            row.setdefault(name)
        reason = column_problem(source, row)
        if reason is not None:
            report.problems.add(reason, place)
            continue
        for outcome in source.rule(row, origin):
            if isinstance(outcome, str):
                report.left_out.add(outcome, place)
                continue
            checked = check_text(outcome)
            condition = plain_condition(outcome.condition)
            if isinstance(checked, str):
                report.problems.add(checked, place)
            elif condition is None:
                report.problems.add("unknown condition", place)
            else:
                report.examples += 1
                yield source.stratum_of(row, origin), checked._replace(condition=condition)


def column_problem(source: Source, row: dict[str, Any]) -> str | None:
    """What is wrong with a row's columns, or None."""
    for name, kind in source.columns.items():
        if name not in row:
            return f"missing {name}"
        value = row[name]
        if value is None and name in source.nullable:
            continue
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            return f"{name} is {'null' if value is None else type(value).__name__}"
    return None


def even_share(index: int, count: int, limit: int) -> int:
    """Rows that unit `index` of `count` reads so that all read `limit`, evenly spread."""
    return (index + 1) * limit // count - index * limit // count


def _require_columns_seen(source: Source, seen: set[str], num_rows: int) -> None:
    missing = [name for name in source.columns if name not in seen]
    if missing and num_rows:
        raise DataError(
            f"source {source.name}: none of {num_rows:,} rows has {', '.join(missing)}; "
            f"expected the columns {', '.join(source.columns)}. Are these the files of "
            f"{source.hub or source.where}?"
        )


def _roots(source: Source, config: HubSourceConfig) -> list[Path]:
    if config.path is None and not config.files:
        if source.hub is None:
            raise ConfigError(f"source {source.name} is not on the Hub; set path to {source.where}")
        return []
    roots = [] if config.path is None else [locate(config.path, source.hub)]
    return roots + [locate(file, None) for file in config.files]


def _hub_units(source: Source, config: HubSourceConfig) -> list[HubUnit]:
    assert source.hub is not None, "_roots refuses sources without one"
    return hub_units(source, source.hub, config.revision)


def _units(
    source: Source,
    config: HubSourceConfig,
    problems: RowProblems,
    wanted: Sequence[int] | None,
) -> Iterator[tuple[Origin, RawRows]]:
    """Files or Hub configs of the source, each cut to its share of the limit.

    Args:
        wanted: the first one and the one behind the last; None: all.
    """
    roots = _roots(source, config)
    if roots:
        count = sum(1 for root in roots for _ in source_files(source, root))
        opened = (
            (file.origin, read_rows(source, file, problems))
            for root in roots
            for file in source_files(source, root)
        )
    else:
        units = _hub_units(source, config)
        count = len(units)
        opened = (
            (unit.origin, hub_rows(source, unit, source.hub or "", config.revision))
            for unit in units
        )
    start, stop = wanted or (0, count)
    for index, (origin, rows) in enumerate(itertools.islice(opened, start, stop), start=start):
        share = None if config.limit is None else even_share(index, count, config.limit)
        if share != 0:
            yield origin, itertools.islice(rows, share)


class _StrataWriter:
    """Appends examples to many files; FLAN has thousands, more than may be open at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.held: dict[str, list[str]] = {}
        self.count = 0

    def add(self, stratum: str, example: Example) -> None:
        line = _ENCODE(example.to_mapping()) + "\n"
        self.held.setdefault(stratum, []).append(line)
        self.count += 1
        if self.count >= ROWS_HELD:
            self.flush()

    def flush(self) -> None:
        for stratum, lines in self.held.items():
            if len(stratum.encode()) > MAX_NAME_BYTES or "\0" in stratum:
                raise DataError(f"{stratum!r} cannot name a file: too long, or not plain text")
            path = self.folder / f"{stratum}.jsonl"
            with path.open("a", encoding="utf-8", newline="\n") as stream:
                stream.writelines(lines)
        self.held, self.count = {}, 0
