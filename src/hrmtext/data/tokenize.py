"""Cleaned rows to tokenised strata: in parallel, incrementally, restartable."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hrmtext.data.example import Example
from hrmtext.data.format import (
    INDEX_NAMES,
    METADATA_FILE,
    REPORT_FILE,
    TOKENIZER_INFO_FILE,
    TOKENS_FILE,
    RowIndex,
    read_json,
    save_array,
    tokenizer_info,
)
from hrmtext.data.sources.local import RowProblems, find_files, read_batches
from hrmtext.data.tokenizer import TOKENIZER_FILE, PromptTokenizer
from hrmtext.data.workers import Progress, WorkerPool
from hrmtext.errors import CheckpointError, DataError
from hrmtext.runtime.io import MARKER, atomic_folder, require_complete, write_json
from hrmtext.runtime.log import logger

WORKER = "hrmtext.data.tokenize_worker"
FORMAT_VERSION = 1
MIN_BYTES_FOR_WORKERS = 8_000_000
"""Below this, starting processes takes longer than tokenising in this one."""


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
    progress: Progress | None = None,
) -> TokenizeReport:
    """Tokenise every file into `out/<stratum>/`, leaving out those that are up to date.

    A stratum is redone if its source's size or time of change differs, or the tokenizer does. Each
    is written whole or not at all, so an interrupted run goes on where it stopped.

    Args:
        sources: a file, a folder, or stratum name -> file.
        num_workers: processes; None: one a core where there is enough to do. The result is the
            same. One process uses all cores too, but reads and writes on one.

    Raises:
        DataError: no source, or a source that cannot be read. StorageError: the disk is full.
    """
    files = dict(sources) if isinstance(sources, Mapping) else find_files(sources)
    out = Path(out)
    tokenizer.save(out)
    write_json(out / TOKENIZER_INFO_FILE, tokenizer_info(tokenizer))
    removed = _remove_orphans(out, set(files))
    todo = [name for name in files if not _is_current(out / name, files[name], tokenizer)]
    # The largest first, so that the last to finish are small.
    todo.sort(key=lambda name: (-files[name].stat().st_size, name))
    num_bytes = sum(files[name].stat().st_size for name in todo)
    if num_workers is None:
        num_workers = (os.cpu_count() or 1) if num_bytes >= MIN_BYTES_FOR_WORKERS else 1

    done = 0

    def advance(index: int) -> None:
        nonlocal done
        done += files[todo[index]].stat().st_size
        if progress is not None:
            progress("tokenizing bytes", done, num_bytes)

    if num_workers > 1 and len(todo) > 1:
        requests = [
            {
                "what": f"tokenizing {files[name]}",
                "source": str(files[name]),
                "folder": str(out / name),
                "tokenizer": str(out / TOKENIZER_FILE),
            }
            for name in todo
        ]
        with WorkerPool(WORKER, num_workers) as pool:
            pool.ask(requests, advance)
    else:
        for index, name in enumerate(todo):
            tokenize_file(files[name], out / name, tokenizer)
            advance(index)

    markers = {name: require_complete(out / name) for name in sorted(files)}
    report = TokenizeReport(
        num_strata=len(files),
        num_redone=len(todo),
        num_removed=removed,
        num_rows=sum(marker["num_rows"] for marker in markers.values()),
        num_tokens=sum(marker["num_tokens"] for marker in markers.values()),
        dropped={name: m["dropped"] for name, m in markers.items() if m["dropped"]},
    )
    write_json(out / REPORT_FILE, report.to_mapping())
    return report


def tokenize_file(source: Path, folder: Path, tokenizer: PromptTokenizer) -> None:
    """Tokenise one file into one stratum folder, whole or not at all."""
    before = source.stat()
    problems = RowProblems()
    writer = _Rows()
    for batch in read_batches(source, problems):
        writer.add(batch, tokenizer)
    tokens, index = writer.arrays()
    with atomic_folder(
        folder,
        replace=True,
        format_version=FORMAT_VERSION,
        tokenizer=tokenizer.fingerprint,
        source_mtime_ns=before.st_mtime_ns,
        num_rows=index.num_rows,
        num_tokens=len(tokens),
        dropped=problems.to_mapping(),
    ) as temporary:
        save_array(temporary / TOKENS_FILE, tokens)
        for name, array in zip(INDEX_NAMES, index, strict=True):
            save_array(temporary / f"{name}.npy", array)
        write_json(
            temporary / METADATA_FILE,
            {"source_mtime": int(before.st_mtime), "source_size": before.st_size},
        )


class _Rows:
    """Rows laid end to end: prompt, response, prompt, response, ..."""

    def __init__(self) -> None:
        self.tokens: list[np.ndarray] = []
        self.lengths: list[np.ndarray] = []

    def add(self, batch: list[Example], tokenizer: PromptTokenizer) -> None:
        conditions, instructions, responses = zip(*batch, strict=True)
        prompts = tokenizer.encode_prompts(instructions, conditions)
        answers = tokenizer.encode_responses(responses)
        flat: list[int] = []
        lengths: list[int] = []
        for prompt, answer in zip(prompts, answers, strict=True):
            flat += prompt
            flat += answer
            lengths += (len(prompt), len(answer))
        self.tokens.append(np.array(flat, dtype=np.uint32))
        self.lengths.append(np.array(lengths, dtype=np.uint64))

    def arrays(self) -> tuple[np.ndarray, RowIndex]:
        tokens = np.concatenate([np.empty(0, np.uint32), *self.tokens])
        lengths = np.concatenate([np.empty(0, np.uint64), *self.lengths])
        starts = np.cumsum(lengths, dtype=np.uint64) - lengths
        return tokens, RowIndex(starts[0::2], lengths[0::2], starts[1::2], lengths[1::2])


def _is_current(folder: Path, source: Path, tokenizer: PromptTokenizer) -> bool:
    try:
        marker = require_complete(folder)
    except CheckpointError:
        return False
    return (
        marker.get("format_version") == FORMAT_VERSION
        and marker.get("tokenizer") == tokenizer.fingerprint
        and marker.get("source_mtime_ns") == source.stat().st_mtime_ns
        and _source_size(folder) == source.stat().st_size
    )


def _source_size(folder: Path) -> int | None:
    try:
        return read_json(folder / METADATA_FILE).get("source_size")
    except DataError:
        return None


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


def handler() -> Callable[[dict[str, Any]], None]:
    """Answers the requests of `tokenize_files` in a worker process."""
    loaded: dict[str, PromptTokenizer] = {}

    def handle(request: dict[str, Any]) -> None:
        path = request["tokenizer"]
        if path not in loaded:
            loaded[path] = PromptTokenizer.load(path)
        tokenize_file(Path(request["source"]), Path(request["folder"]), loaded[path])

    return handle
