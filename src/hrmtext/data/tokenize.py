"""Cleaned rows to tokenised strata: in parallel, incrementally, restartable.

Large files are tokenised in parts, by several workers; a part is a folder of the same form as a
stratum below `.parts/`, and parts are joined when the last of a stratum is there.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from hrmtext.data.clean_rows import add_places
from hrmtext.data.engine import Engine, LocalEngine
from hrmtext.data.format import (
    METADATA_FILE,
    REPORT_FILE,
    TOKENIZER_INFO_FILE,
    TOKENS_FILE,
    read_json,
    tokenizer_info,
)
from hrmtext.data.parts import Part, plan_parts
from hrmtext.data.sources.local import RowProblems, find_files
from hrmtext.data.stratum import StratumWriter
from hrmtext.data.tokenizer import TOKENIZER_FILE, PromptTokenizer
from hrmtext.data.workers import Progress
from hrmtext.errors import CheckpointError, DataError
from hrmtext.runtime.io import (
    MARKER,
    atomic_folder,
    exclusive,
    fingerprint,
    remove_leftovers,
    require_complete,
    write_json,
)
from hrmtext.runtime.log import logger

FORMAT_VERSION = 2
PARTS_FOLDER = ".parts"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizeReport:
    """What `tokenize_files` did."""

    num_strata: int
    num_redone: int
    """Strata tokenised now; the others were up to date."""
    num_removed: int
    """Strata removed, since their source is gone."""
    num_rows: int
    num_tokens: int
    dropped: dict[str, dict[str, Any]]
    """Stratum -> reason -> rows and first places."""

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


def tokenize_files(
    sources: str | Path | Mapping[str, Path],
    out: str | Path,
    tokenizer: PromptTokenizer,
    *,
    num_workers: int | None = None,
    engine: Engine | None = None,
    part_bytes: int | None = None,
    progress: Progress | None = None,
) -> TokenizeReport:
    """Tokenise every file into `out/<stratum>/`, leaving out those that are up to date.

    A stratum is redone if its source's content differs, or the tokenizer does; a source of the same
    size and time of change is taken to be the same. Strata and parts are written whole or not at
    all, so an interrupted run goes on where it stopped. Memory does not grow with the files.

    Args:
        sources: a file, a folder, or stratum name -> file.
        num_workers: processes of this machine; None: one a core where there is enough to do. The
            result is the same. One process uses all cores too, but reads and writes on one.
        engine: where tasks run, in place of `num_workers` processes.
        part_bytes: about how much of a file is one part; None: what suits the engine. The result
            is the same.

    Raises:
        DataError: no source, or a source that cannot be read. StorageError: the disk is full, or
            another process writes `out`.
    """
    files = dict(sources) if isinstance(sources, Mapping) else find_files(sources)
    out = Path(out)
    with exclusive(out):
        tokenizer.save(out)
        write_json(out / TOKENIZER_INFO_FILE, tokenizer_info(tokenizer))
        remove_leftovers(out, *(out / PARTS_FOLDER).glob("*"))
        removed = _remove_orphans(out, set(files))
        todo = [name for name in files if not _is_current(out / name, files[name], tokenizer)]
        # The largest first, so that the last to finish are small.
        todo.sort(key=lambda name: (-files[name].stat().st_size, name))
        with contextlib.ExitStack() as stack:
            if engine is None:
                engine = stack.enter_context(LocalEngine(num_workers))
            if part_bytes is None:
                part_bytes = engine.part_bytes(sum(files[name].stat().st_size for name in todo))
            use = {
                "file": str(out / TOKENIZER_FILE),
                "content": fingerprint(out / TOKENIZER_FILE),
                "key": tokenizer.fingerprint,
            }
            _Run(out, {name: files[name] for name in todo}, use, part_bytes, progress).work(engine)
        shutil.rmtree(out / PARTS_FOLDER, ignore_errors=True)
        markers = {name: require_complete(out / name) for name in sorted(files)}
        report = TokenizeReport(
            num_strata=len(files),
            num_redone=len(todo),
            num_removed=removed,
            num_rows=sum(marker["num_rows"] for marker in markers.values()),
            num_tokens=sum(marker["num_tokens"] for marker in markers.values()),
            dropped={name: m["dropped"] for name, m in markers.items() if m["dropped"]},
        )
        # What this run happened to redo is no property of the folder: left out of the file.
        lasting = report.to_mapping()
        del lasting["num_redone"], lasting["num_removed"]
        write_json(out / REPORT_FILE, lasting)
    return report


class _Run:
    """The strata to do, as requests for workers (or for this process, if it works alone)."""

    def __init__(
        self,
        out: Path,
        files: Mapping[str, Path],
        tokenizer: Mapping[str, str],
        part_bytes: int,
        progress: Progress | None,
    ) -> None:
        self.out = out
        self.progress = progress
        self.num_bytes = sum(path.stat().st_size for path in files.values())
        self.done = 0.0
        self.requests: list[dict[str, Any]] = []
        self.weights: list[float] = []
        self.waiting: collections.Counter[str] = collections.Counter()
        self.joins: dict[str, dict[str, Any]] = {}
        for name, path in files.items():
            parts = plan_parts(path, part_bytes)
            stat = path.stat()
            request = {
                "task": "tokenize",
                "what": f"tokenizing {path}",
                "tokenizer": tokenizer,
                "source": str(path),
                "folder": str(out / name),
                "stat": [stat.st_size, stat.st_mtime_ns],
            }
            if len(parts) == 1:
                self._add(request, stat.st_size)
                continue
            folders = [str(out / PARTS_FOLDER / name / f"{at:06}") for at in range(len(parts))]
            # The bounds tell whether a part left by a killed run is of the same cut.
            bounds = [[str(folder), *part] for folder, part in zip(folders, parts, strict=True)]
            for folder, *part in bounds:
                self._add(request | {"part": part, "folder": folder}, stat.st_size / len(parts))
            self.waiting[str(path)] = len(parts)
            self.joins[str(path)] = request | {"join": folders}

    def work(self, engine: Engine) -> None:
        """Answer all requests."""
        if self.requests:
            engine.require(
                written=[self.out], read=sorted({Path(r["source"]) for r in self.requests})
            )
            engine.ask(self.requests, self._answered, num_bytes=self.num_bytes)

    def _add(self, request: dict[str, Any], weight: float) -> None:
        self.requests.append(request)
        self.weights.append(weight)

    def _answered(self, index: int) -> dict[str, Any] | None:
        """Count progress; the joining of a stratum whose last part this was."""
        self.done += self.weights[index]
        if self.progress is not None:
            self.progress("tokenizing bytes", round(self.done), self.num_bytes)
        source = self.requests[index]["source"]
        self.waiting[source] -= 1
        return self.joins.get(source) if self.waiting[source] == 0 else None


def tokenize_file(source: Path, folder: Path, tokenizer: PromptTokenizer) -> None:
    """Tokenise one file into one stratum folder, whole or not at all."""
    stat = source.stat()
    problems = RowProblems()
    with _stratum(source, folder, tokenizer, [stat.st_size, stat.st_mtime_ns]) as writer:
        writer.add_rows(source, tokenizer, problems)
        writer.dropped = problems.to_mapping()


def _tokenize_part(request: dict[str, Any], tokenizer: PromptTokenizer) -> None:
    """Tokenise one part, unless an earlier run has left it."""
    folder = Path(request["folder"])
    key = [*request["stat"], *request["part"], tokenizer.fingerprint]
    with contextlib.suppress(CheckpointError):
        if require_complete(folder).get("key") == key:
            return
    problems = RowProblems()
    marker: dict[str, Any] = {"key": key}
    with (
        atomic_folder(folder, replace=True, late=marker) as temporary,
        StratumWriter(temporary) as writer,
    ):
        writer.add_rows(Path(request["source"]), tokenizer, problems, Part(*request["part"]))
        marker |= {"num_read": problems.num_read, "dropped": problems.to_mapping()}


def _join_parts(request: dict[str, Any], tokenizer: PromptTokenizer) -> None:
    """Put the parts of a stratum together, and remove them."""
    folders = [Path(folder) for folder in request["join"]]
    source, folder = Path(request["source"]), Path(request["folder"])
    dropped: dict[str, dict[str, Any]] = {}
    with _stratum(source, folder, tokenizer, request["stat"]) as writer:
        num_read = 0
        for part in folders:
            marker = require_complete(part)
            writer.add_part(part)
            add_places(dropped, marker["dropped"], num_read)
            num_read += marker["num_read"]
        writer.dropped = dict(sorted(dropped.items()))
    shutil.rmtree(folders[0].parent)


@contextlib.contextmanager
def _stratum(
    source: Path, folder: Path, tokenizer: PromptTokenizer, stat: list[int]
) -> Iterator[StratumWriter]:
    """Write a stratum folder; refuse a source that has changed since `stat` (size, time in ns)."""
    marker: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "tokenizer": tokenizer.fingerprint,
        "source": "",
        "source_mtime_ns": stat[1],
    }
    with atomic_folder(folder, replace=True, late=marker) as temporary:
        with StratumWriter(temporary) as writer:
            yield writer
        marker |= {
            "source": fingerprint(source),
            "num_rows": writer.num_rows,
            "num_tokens": writer.num_tokens,
            "dropped": writer.dropped,
        }
        now = source.stat()
        if [now.st_size, now.st_mtime_ns] != stat:
            raise DataError(f"{source} was changed while it was tokenised; run the same again")
        _write_metadata(temporary, now)


def _write_metadata(folder: Path, stat: os.stat_result) -> None:
    values = {"source_mtime": int(stat.st_mtime), "source_size": stat.st_size}
    write_json(folder / METADATA_FILE, values)


def _is_current(folder: Path, source: Path, tokenizer: PromptTokenizer) -> bool:
    try:
        marker = require_complete(folder)
        size = read_json(folder / METADATA_FILE).get("source_size")
    except (CheckpointError, DataError):
        return False
    stat = source.stat()
    if (
        marker.get("format_version") != FORMAT_VERSION
        or marker.get("tokenizer") != tokenizer.fingerprint
        or size != stat.st_size
    ):
        return False
    if marker["source_mtime_ns"] == stat.st_mtime_ns:
        return True
    if marker["source"] != fingerprint(source):
        return False
    # Touched, but the same: note the new time, so that it need not be read again.
    _write_metadata(folder, stat)
    write_json(folder / MARKER, marker | {"source_mtime_ns": stat.st_mtime_ns})
    return True


def _remove_orphans(out: Path, expected: set[str]) -> int:
    """Remove strata whose source is gone; only folders that a tokeniser wrote."""
    removed = 0
    for folder in sorted(out.iterdir()):
        ours = folder.is_dir() and (folder / TOKENS_FILE).exists() and (folder / MARKER).exists()
        if ours and folder.name not in expected:
            logger.info("removing %s: its source is gone", folder)
            shutil.rmtree(folder)
            removed += 1
    return removed


def answer(request: dict[str, Any]) -> None:
    """Do one task of `tokenize_files`: a file, a part of one, or the joining of its parts."""
    tokenizer = _load_tokenizer(**request["tokenizer"])
    if "join" in request:
        _join_parts(request, tokenizer)
    elif "part" in request:
        _tokenize_part(request, tokenizer)
    else:
        tokenize_file(Path(request["source"]), Path(request["folder"]), tokenizer)


@lru_cache(maxsize=2)
def _load_tokenizer(file: str, content: str, key: str) -> PromptTokenizer:
    """Load a tokenizer, or the one loaded before.

    Args:
        content: fingerprint of the file. key: of the tokenizer in it, which is slow to compute.

    Raises:
        DataError: the file is another by now.
    """
    if fingerprint(Path(file)) != content:
        raise DataError(f"{file} was changed while texts were tokenised; run the same again")
    return PromptTokenizer.load(file, known_fingerprint=key)
