"""Filters between the sources and the tokenizer; every dropped row is counted by reason."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from hrmtext.config.data import CleaningConfig
from hrmtext.data.clean_parts import (
    CODES_FILE,
    clean_part,
    mark_duplicates,
    mark_near_duplicates,
    part_request,
)
from hrmtext.data.clean_rows import Cleaner, CleaningReport, StratumCleaning
from hrmtext.data.engine import Engine, LocalEngine
from hrmtext.data.example import Example
from hrmtext.data.format import REPORT_FILE
from hrmtext.data.parts import PART_BYTES, plan_parts
from hrmtext.data.sources.local import RowProblems
from hrmtext.data.workers import Progress
from hrmtext.errors import DataError
from hrmtext.runtime.io import atomic_folder, explain_storage_errors, write_json

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceStratum:
    """Rows of one stratum on their way to cleaning."""

    name: str
    """Name without a file's ending."""
    batches: Iterable[list[Example]]
    problems: RowProblems = dataclasses.field(default_factory=RowProblems)
    """Filled while `batches` is read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file of rows on their way to cleaning."""

    path: Path
    strict: bool = False
    """Stop at the first bad row instead of counting it."""
    eval_size: int = 0
    """Prompts held out of training."""


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
    parts: dict[str, list[Path]] = {}
    with parts_folder(out) as work, LocalEngine(1) as engine:
        for number, stratum in enumerate(strata):
            if stratum.name in parts:
                raise DataError(
                    f"two sources give the stratum {stratum.name!r}; set a prefix for one of them"
                )
            folder = work / f"{number:06}" / f"{0:06}"
            clean_part(stratum.batches, stratum.problems, folder, cleaner)
            parts[stratum.name] = [folder]
        return _join(parts, out, config, engine, inputs, 0, None)


def clean_files(
    files: Mapping[str, SourceFile],
    out: str | Path,
    config: CleaningConfig,
    engine: Engine,
    *,
    held_out_prompts: frozenset[str] = frozenset(),
    inputs: str = "",
    part_bytes: int = PART_BYTES,
    progress: Progress | None = None,
) -> CleaningReport:
    """As `clean`, of files by stratum, in parts, by the engine's workers.

    Parts lie in `parts_folder(out)` for a while, about as large as the result; an interrupted run
    goes on from those that are whole. No process holds more than a batch of rows, and of each row
    that may have duplicates a hash.

    Args:
        part_bytes: about how much of a file is one part; the result is the same.

    Raises:
        DataError: bad input, or not one good row. StorageError: the disk is full.
    """
    out = Path(out)
    total = sum(file.path.stat().st_size for file in files.values())
    with parts_folder(out, keep=True) as work:
        held_out = None
        if held_out_prompts:
            held_out = work / "held_out.json"
            write_json(held_out, sorted(held_out_prompts))
        requests, weights, parts = [], [], {}
        for number, (name, file) in enumerate(files.items()):
            stat = file.path.stat()
            cuts = plan_parts(file.path, part_bytes)
            parts[name] = [work / f"{number:06}" / f"{at:06}" for at in range(len(cuts))]
            for cut, folder in zip(cuts, parts[name], strict=True):
                key = [inputs, name, stat.st_size, stat.st_mtime_ns, *cut]
                requests.append(
                    part_request(
                        config, file.path, cut, folder,
                        strict=file.strict, held_out=held_out, key=key,
                    )
                )  # fmt: skip
                weights.append(stat.st_size / len(cuts))
        done = 0.0

        def advance(index: int) -> None:
            nonlocal done
            done += weights[index]
            if progress is not None:
                progress("cleaning bytes", round(done), total)

        engine.require(written=[work], read=[file.path for file in files.values()])
        engine.ask(requests, advance, num_bytes=total)
        report = _join(parts, out, config, engine, inputs, total, progress)
    shutil.rmtree(work)
    return report


def parts_path(out: Path) -> Path:
    """Where the parts of the folder `out` lie while it is made."""
    return out.with_name(f".{out.name}.parts")


@contextlib.contextmanager
def parts_folder(out: Path, *, keep: bool = False) -> Iterator[Path]:
    """The hidden folder beside `out` that parts lie in.

    Args:
        keep: leave it, for a later run to go on from; else it is empty first and gone after.
    """
    folder = parts_path(out)
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        with explain_storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        yield folder
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _join(
    parts: Mapping[str, Sequence[Path]],
    out: Path,
    config: CleaningConfig,
    engine: Engine,
    inputs: str,
    num_bytes: int,
    progress: Progress | None,
) -> CleaningReport:
    """Compare the rows of all parts, and write each stratum's file."""
    folders = [folder for stratum in parts.values() for folder in stratum]
    with explain_storage_errors(out):
        for folder in folders:
            folder.with_suffix(f".{CODES_FILE}").unlink(missing_ok=True)
        if config.drop_duplicates:
            mark_duplicates(folders)
        if config.near_duplicates is not None and folders:
            mark_near_duplicates(folders, config.near_duplicates, folders[0].parents[1])
    with atomic_folder(
        out, replace=True, format_version=FORMAT_VERSION, inputs=inputs
    ) as temporary:
        requests = [
            {
                "task": "clean",
                "what": f"joining {name}",
                "join": [str(folder) for folder in stratum],
                "out": str(temporary / f"{name}.{config.format}"),
                "before": str(out / f"{name}.{config.format}"),
            }
            for name, stratum in parts.items()
        ]
        done = 0

        def advance(index: int) -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress("writing cleaned strata", done, len(requests))

        answers = engine.ask(requests, advance, num_bytes=num_bytes)
        strata = {
            name: StratumCleaning(**answer) for name, answer in zip(parts, answers, strict=True)
        }
        report = CleaningReport(strata=strata)
        if not report.kept:
            raise DataError(f"no row is left after cleaning; dropped: {report.dropped}")
        write_json(temporary / REPORT_FILE, report.to_mapping())
    return report
