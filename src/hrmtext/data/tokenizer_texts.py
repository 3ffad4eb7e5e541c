"""Which texts a tokenizer is trained on: a seeded sample of every stratum."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hrmtext.data.arrays import open_array, save_array
from hrmtext.data.engine import Engine, LocalEngine
from hrmtext.data.example import Example
from hrmtext.data.parts import PART_BYTES, Part, plan_parts
from hrmtext.data.sources.local import RowProblems, find_files, read_batches
from hrmtext.data.workers import Progress
from hrmtext.runtime.io import atomic_file, explain_storage_errors, fingerprint

Keys = npt.NDArray[np.uint64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSample:
    """How rows are sampled."""

    max_rows_per_stratum: int | None = None
    """Rows of each stratum; None: no bound."""
    max_rows: int | None = None
    """Rows of all strata together; None: no bound."""
    max_chars: int
    """Characters taken of each text."""
    seed: int = 0


def training_texts(
    folder: str | Path,
    sample: TextSample,
    progress: Progress | None = None,
    *,
    engine: Engine | None = None,
    part_bytes: int = PART_BYTES,
    work: Path | None = None,
) -> Iterator[str]:
    """Instructions and responses for tokenizer training.

    A row is in the sample if its key, a hash of the seed and its text, is among the smallest: of
    its stratum, and of all. So the sample is random, the same on every run, and does not depend on
    the order of rows; with `max_rows` alone neither on how they are split into files. Files are
    read twice, in parts, first for the keys; 8 bytes a sampled row are held.

    Args:
        engine: where parts are read; None: in this process.
        work: folder for what the parts give, from which an interrupted run goes on; None: a
            temporary one.
    """
    files = list(find_files(folder).values())
    bounds = [n for n in (sample.max_rows_per_stratum, sample.max_rows) if n is not None]
    if not bounds:
        for path in files:
            for batch in read_batches(path, RowProblems()):
                for row in batch:
                    yield from _texts(row, sample.max_chars)
        return
    with contextlib.ExitStack() as stack:
        if engine is None:
            engine = stack.enter_context(LocalEngine(1))
        if work is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stats = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
        work = work / fingerprint(dataclasses.asdict(sample), part_bytes, stats)
        with explain_storage_errors(work):
            work.mkdir(parents=True, exist_ok=True)
        parts = [
            [
                _Part(path, part, work / f"{number:06}.{at:06}")
                for at, part in enumerate(plan_parts(path, part_bytes))
            ]
            for number, path in enumerate(files)
        ]
        everything = list(itertools.chain.from_iterable(parts))
        engine.require(written=[work], read=files)
        common = {"task": "texts", "seed": sample.seed, "max_chars": sample.max_chars}
        _ask(
            engine, "choosing texts for the tokenizer, parts", progress,
            [part.request(common | {"limit": min(bounds)}) for part in everything],
        )  # fmt: skip
        keys = [
            _first(
                np.concatenate([open_array(part.keys) for part in stratum]),
                sample.max_rows_per_stratum or min(bounds),
            )
            for stratum in parts
        ]
        if sample.max_rows is not None:
            keys = _cut(keys, sample.max_rows)
        chosen = [(stratum, own) for stratum, own in zip(parts, keys, strict=True) if len(own)]
        _ask(
            engine, "reading texts for the tokenizer, parts", progress,
            [part.request(common | {"last": int(own[-1])})
             for stratum, own in chosen for part in stratum],
        )  # fmt: skip
        for stratum, own in chosen:
            yield from _drawn(stratum, own)


class _Part(NamedTuple):
    source: Path
    part: Part
    result: Path
    """What its files' names begin with."""

    @property
    def keys(self) -> Path:
        return self.result.with_suffix(f"{self.result.suffix}.keys.npy")

    @property
    def texts(self) -> Path:
        return self.result.with_suffix(f"{self.result.suffix}.texts.jsonl")

    def request(self, settings: dict[str, Any]) -> dict[str, Any]:
        what = f"drawing texts of {self.source}"
        places = {"source": str(self.source), "part": list(self.part), "result": str(self.result)}
        return settings | places | {"what": what}


def answer(request: dict[str, Any]) -> None:
    """Do one task: the smallest keys of a part, or its rows whose keys are small enough."""
    part = _Part(Path(request["source"]), Part(*request["part"]), Path(request["result"]))
    batches = read_batches(part.source, RowProblems(), part.part)
    if "limit" in request:
        if not part.keys.is_file():
            keys = _smallest_keys(batches, request["limit"], request["seed"])
            with atomic_file(part.keys) as temporary:
                save_array(temporary, keys)
        return
    if part.texts.is_file():
        return
    with atomic_file(part.texts) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for batch in batches:
            keys = row_keys(batch, request["seed"])
            for number in np.flatnonzero(keys <= np.uint64(request["last"])).tolist():
                texts = list(_texts(batch[number], request["max_chars"]))
                stream.write(json.dumps([int(keys[number]), texts]) + "\n")


def _ask(
    engine: Engine, what: str, progress: Progress | None, requests: list[dict[str, Any]]
) -> None:
    done = 0

    def advance(index: int) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(what, done, len(requests))

    num_bytes = sum(
        Path(source).stat().st_size for source in {request["source"] for request in requests}
    )
    engine.ask(requests, advance, num_bytes=num_bytes)


def _drawn(stratum: Sequence[_Part], keys: Keys) -> Iterator[str]:
    """Texts of the rows that have one of `keys`, the largest of which counts as often as it is."""
    last, spare = int(keys[-1]), int((keys == keys[-1]).sum())
    for part in stratum:
        with part.texts.open(encoding="utf-8") as stream:
            for line in stream:
                key, texts = json.loads(line)
                if key == last:
                    spare -= 1
                    if spare < 0:
                        continue
                yield from texts


def row_keys(rows: Sequence[Example], seed: int) -> Keys:
    """(R) keys of rows."""
    salt = f"tokenizer texts {seed}".encode()
    raw = b"".join(
        hashlib.blake2b(
            repr(tuple(row)).encode(errors="surrogatepass"), digest_size=8, key=salt
        ).digest()
        for row in rows
    )
    return np.frombuffer(raw, dtype="<u8").astype(np.uint64)


def _smallest_keys(batches: Iterable[list[Example]], limit: int, seed: int) -> Keys:
    held, count = [np.zeros(0, np.uint64)], 0
    for batch in batches:
        held.append(row_keys(batch, seed))
        count += len(batch)
        if count > 2 * limit:
            held = [_first(np.concatenate(held), limit)]
            count = limit
    return _first(np.concatenate(held), limit)


def _first(keys: Keys, count: int) -> Keys:
    return np.sort(keys)[:count]


def _cut(keys: list[Keys], count: int) -> list[Keys]:
    """Of each stratum's keys those that are among the `count` smallest of all."""
    everything = np.sort(np.concatenate(keys))
    if len(everything) <= count:
        return keys
    last = everything[count - 1]
    # Rows that are equal have equal keys: which of them are taken is no matter, only how many.
    spare = count - int(np.searchsorted(everything, last, side="left"))
    cut = []
    for values in keys:
        below = values[values < last]
        equal = min(spare, int((values == last).sum()))
        spare -= equal
        cut.append(np.concatenate([below, np.full(equal, last)]))
    return cut


def _texts(row: Example, max_chars: int) -> Iterator[str]:
    for turn in row.turns():
        yield turn.instruction[:max_chars]
        yield turn.response[:max_chars]
