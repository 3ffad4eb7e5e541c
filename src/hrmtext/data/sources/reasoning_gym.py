"""Reasoning problems from reasoning-gym: a declared mix, train and held-out sharing no prompt.

Item i of seed s equals item i+1 of seed s-1 in reasoning-gym, so neighbouring seeds overlap.
Training and held-out rows therefore use far apart seeds, and prompts are compared as well.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from hrmtext.config.base import nearest
from hrmtext.config.data import FamilyConfig, ReasoningGymConfig
from hrmtext.data.example import Example
from hrmtext.errors import BackendError, ConfigError, DataError
from hrmtext.runtime.log import logger, warn_once
from hrmtext.runtime.rng import keyed_seed

ITEMS_PER_REQUEST = 500
HELD_OUT_SEED_DISTANCE = 2**30
"""Held-out seeds lie that far above training seeds; no family can have as many rows."""
MAX_ATTEMPTS_PER_HELD_OUT_ROW = 20
WORKER = "hrmtext.data.sources.reasoning_gym_worker"

Progress = Callable[[str, int, int], None]
"""Called with (what is done, done so far, total)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutRow:
    """A row for evaluation."""

    stratum: str
    """Stratum, for reasoning-gym the family's label."""
    condition: str
    instruction: str
    response: str
    family: str | None = None
    """Family whose scorer can judge the row, where there is one."""
    metadata: dict[str, Any] | None = None
    """What the family's scorer needs; None: only exact match can judge the row."""


@dataclasses.dataclass(kw_only=True)
class FamilyReport:
    """Counts of one family."""

    family: str
    train_rows: int = 0
    unique_train_prompts: int = 0
    held_out_rows: int = 0
    held_out_asked: int = 0
    held_out_with_metadata: int = 0
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    """Rows not used, by reason."""
    first_error: str | None = None
    """Message of the first item that the family failed to generate."""

    def drop(self, reason: str) -> None:
        """Count one row that is not used."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReasoningGymReport:
    """Counts of the whole mix."""

    families: dict[str, FamilyReport]
    train_rows: int
    held_out_rows: int
    shared_prompts: int
    """Held-out prompts found among the training prompts at the end; 0, or `generate` raises."""
    prompts_compared: int
    """Different training prompts that were looked up among the held-out ones."""

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReasoningGymData:
    """Rows by stratum, and what happened on the way."""

    train: dict[str, list[Example]]
    held_out: dict[str, list[HeldOutRow]]
    report: ReasoningGymReport


def normalize_prompt(text: str) -> str:
    """The form in which prompts are compared: case, spacing and Unicode variants do not count."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def family_names() -> list[str]:
    """Families that the installed reasoning-gym knows; BackendError if it is not installed."""
    _require_reasoning_gym()
    from reasoning_gym.factory import DATASETS

    return sorted(DATASETS)


def generate(config: ReasoningGymConfig, progress: Progress | None = None) -> ReasoningGymData:
    """Generate the mix; the same for any number of workers, in any process.

    Held-out rows come first and are unique by normalised prompt. A training row whose prompt is
    held out (by any family) is dropped and counted, not replaced.

    Raises:
        ConfigError: an unknown family, or settings that the family refuses.
        DataError: a family gives no usable row, or the final check finds a shared prompt.
        BackendError: reasoning-gym is not installed.
    """
    known = family_names()
    for family in config.families:
        if family.name not in known:
            raise ConfigError(
                f"unknown reasoning-gym family {family.name!r}{nearest(family.name, known)}"
            )
    total = sum(config.sizes) + sum(config.eval_sizes)
    reports = {f.stratum: FamilyReport(family=f.name) for f in config.families}
    with _Pool(config.num_workers or os.cpu_count() or 1, total, progress) as pool:
        held_out = _generate_held_out(config, pool, reports)
        held_out_prompts = {
            normalize_prompt(row.instruction) for rows in held_out.values() for row in rows
        }
        train = _generate_train(config, pool, reports, held_out_prompts)
    prompts = {normalize_prompt(row.instruction) for rows in train.values() for row in rows}
    shared = len(prompts & held_out_prompts)
    if shared:
        raise DataError(f"{shared} prompts are both in the training and the held-out rows")
    report = ReasoningGymReport(
        families=reports,
        train_rows=sum(map(len, train.values())),
        held_out_rows=sum(map(len, held_out.values())),
        shared_prompts=shared,
        prompts_compared=len(prompts),
    )
    return ReasoningGymData(train=train, held_out=held_out, report=report)


def score(
    family: str, entry: dict[str, Any], answer: str, config: dict[str, Any] | None = None
) -> float:
    """The family's own mark for `answer`, 0.0 to 1.0; a scorer that fails on it gives 0.0.

    Args:
        entry: `{"question", "answer", "metadata"}` of a held-out row.
        config: the family's settings, where they are not its defaults.

    Raises:
        DataError: an unknown family. BackendError: reasoning-gym is not installed.
    """
    known = family_names()
    if family not in known:
        raise DataError(f"unknown reasoning-gym family {family!r}{nearest(family, known)}")
    dataset = _scorer(family, json.dumps(config or {}, sort_keys=True))
    try:
        return float(dataset.score_answer(answer, entry))
    except Exception as error:  # the answer is a model's free text: whatever breaks, it is wrong
        warn_once(f"the scorer of {family} failed on an answer, scored 0: {type(error).__name__}")
        return 0.0


def _generate_held_out(
    config: ReasoningGymConfig, pool: _Pool, reports: dict[str, FamilyReport]
) -> dict[str, list[HeldOutRow]]:
    rows: dict[str, list[HeldOutRow]] = {f.stratum: [] for f in config.families}
    asked = {f.stratum: n for f, n in zip(config.families, config.eval_sizes, strict=True)}
    tried = dict.fromkeys(rows, 0)
    seen: set[str] = set()
    while True:
        # Families run side by side; each asks for what it still lacks, and a little more.
        wanted = []
        for family in config.families:
            name = family.stratum
            lacking = asked[name] - len(rows[name])
            left = MAX_ATTEMPTS_PER_HELD_OUT_ROW * asked[name] - tried[name]
            if lacking > 0 and left > 0:
                extra = lacking // 4 + 4 if tried[name] else 0
                stop = tried[name] + min(lacking + extra, left)
                wanted.append((family, tried[name], stop))
                tried[name] = stop
        if not wanted:
            break
        for (family, _, _), items in zip(
            wanted, pool.run(config, wanted, held_out=True), strict=True
        ):
            name = family.stratum
            for item in items:
                if len(rows[name]) == asked[name]:
                    break
                usable = _usable(item, reports[name], "held-out: ")
                if usable is None:
                    continue
                question, answer, metadata = usable
                key = normalize_prompt(question)
                if key in seen:
                    reports[name].drop("held-out: prompt given before")
                    continue
                seen.add(key)
                rows[name].append(
                    HeldOutRow(
                        stratum=name,
                        condition=family.condition,
                        instruction=question,
                        response=answer,
                        family=family.name,
                        metadata=metadata,
                    )
                )
    for name, found in rows.items():
        report = reports[name]
        report.held_out_rows, report.held_out_asked = len(found), asked[name]
        report.held_out_with_metadata = sum(row.metadata is not None for row in found)
        if asked[name] and not found:
            raise DataError(_no_rows(name, "held-out", report))
    return rows


def _generate_train(
    config: ReasoningGymConfig,
    pool: _Pool,
    reports: dict[str, FamilyReport],
    held_out_prompts: set[str],
) -> dict[str, list[Example]]:
    wanted = [
        (f, 0, size) for f, size in zip(config.families, config.sizes, strict=True) if size > 0
    ]
    train: dict[str, list[Example]] = {}
    for (family, _, _), items in zip(wanted, pool.run(config, wanted, held_out=False), strict=True):
        report = reports[family.stratum]
        rows: list[Example] = []
        seen: set[str] = set()
        for item in items:
            usable = _usable(item, report, "")
            if usable is None:
                continue
            question, answer, _ = usable
            key = normalize_prompt(question)
            if key in held_out_prompts:
                report.drop("prompt is held out")
                continue
            if key in seen and config.duplicates == "drop":
                report.drop("prompt given before")
                continue
            seen.add(key)
            rows.append(Example(family.condition, question, answer))
        if not rows:
            raise DataError(_no_rows(family.stratum, "training", report))
        lost = report.dropped.get("prompt is held out", 0)
        if lost > len(rows):
            logger.warning(
                "family %s: %d of %d training rows were dropped, since their prompts are held "
                "out; it has few different prompts, so ask for fewer held-out rows",
                family.stratum, lost, len(rows) + lost,
            )  # fmt: skip
        report.train_rows, report.unique_train_prompts = len(rows), len(seen)
        train[family.stratum] = rows
    return train


def _usable(item: Any, report: FamilyReport, prefix: str) -> tuple[str, str, Any] | None:
    """(question, answer, metadata), or None after counting why not."""
    if isinstance(item, dict):
        report.drop(prefix + "the family failed to generate it")
        report.first_error = report.first_error or item["error"]
        return None
    question, answer, metadata = item
    if answer is None:
        report.drop(prefix + "no answer")
    elif not answer.strip():
        report.drop(prefix + "empty answer")
    elif not question.strip():
        report.drop(prefix + "empty question")
    else:
        return question, answer, metadata
    return None


def _no_rows(name: str, kind: str, report: FamilyReport) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items())
    hint = f" (first error: {report.first_error})" if report.first_error else ""
    return (
        f"family {name!r} gave no usable {kind} row: {reasons}{hint}; "
        "leave it out, or ask for more or harder rows"
    )


@lru_cache(maxsize=256)
def _scorer(family: str, config: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(family, seed=0, size=1, **json.loads(config))


def _require_reasoning_gym() -> None:
    if importlib.util.find_spec("reasoning_gym") is None:
        raise BackendError(
            "reasoning-gym is not installed; install the data extra: pip install 'hrm-text[data]'"
        )


class _Pool:
    """Worker processes; a request's answer does not depend on which worker gives it."""

    def __init__(self, num_workers: int, total: int, progress: Progress | None) -> None:
        self.num_workers = num_workers
        self.total, self.done, self.progress = total, 0, progress
        self._processes: list[tuple[subprocess.Popen[str], IO[bytes]]] = []

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        for process, log in self._processes:
            if exception[0] is not None:
                process.kill()
            if process.stdin is not None:
                process.stdin.close()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
            log.close()

    def run(
        self,
        config: ReasoningGymConfig,
        wanted: Sequence[tuple[FamilyConfig, int, int]],
        *,
        held_out: bool,
    ) -> list[Iterable[Any]]:
        """Items [start, stop) of each wanted family, in order."""
        requests: list[tuple[int, dict[str, Any]]] = []
        for which, (family, start, stop) in enumerate(wanted):
            # Room for HELD_OUT_SEED_DISTANCE twice below the 32 bits that some families allow.
            seed = keyed_seed(config.seed, "reasoning-gym", family.stratum) % 2**30
            for at in range(start, stop, ITEMS_PER_REQUEST):
                requests.append(
                    (
                        which,
                        {
                            "family": family.name,
                            "config": family.config,
                            "seed": seed + (HELD_OUT_SEED_DISTANCE if held_out else 0),
                            "size": HELD_OUT_SEED_DISTANCE,
                            "start": at,
                            "stop": min(at + ITEMS_PER_REQUEST, stop),
                            "with_metadata": held_out,
                        },
                    )
                )
        answers = self._ask([request for _, request in requests])
        items: list[list[Any]] = [[] for _ in wanted]
        for (which, _), answer in zip(requests, answers, strict=True):
            items[which].extend(answer)
        return list(items)

    def _ask(self, requests: list[dict[str, Any]]) -> list[list[Any]]:
        answers: list[list[Any]] = [[] for _ in requests]
        queue = collections.deque(range(len(requests)))
        failures: list[Exception] = []
        lock = threading.Lock()
        while len(self._processes) < min(self.num_workers, len(requests)):
            self._processes.append(_start_worker())

        def serve(process: subprocess.Popen[str], log: IO[bytes]) -> None:
            while not failures:
                try:
                    index = queue.popleft()
                except IndexError:
                    return
                try:
                    answers[index] = _exchange(process, log, requests[index])
                except Exception as error:  # raised below, in the caller's thread
                    failures.append(error)
                    return
                with lock:
                    self.done += requests[index]["stop"] - requests[index]["start"]
                    if self.progress is not None:
                        self.progress("generating", min(self.done, self.total), self.total)

        threads = [threading.Thread(target=serve, args=pair) for pair in self._processes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return answers


def _start_worker() -> tuple[subprocess.Popen[str], IO[bytes]]:
    log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with its process)
    source = str(Path(__file__).parents[3])  # the worker runs this very code, installed or not
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", WORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=environment,
        text=True,
        encoding="utf-8",
    )
    return process, log


def _exchange(process: subprocess.Popen[str], log: IO[bytes], request: dict[str, Any]) -> list[Any]:
    assert process.stdin is not None and process.stdout is not None, "opened with pipes"
    try:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:
        line = ""
    if not line:
        log.seek(0)
        tail = log.read()[-2000:].decode(errors="replace")
        raise DataError(
            f"the process that generates {request['family']!r} ended with status "
            f"{process.wait()}; its last words:\n{tail}"
        )
    reply = json.loads(line)
    if "failure" in reply:
        raise ConfigError(
            f"reasoning-gym family {request['family']!r} refuses its settings "
            f"{request['config']}: {reply['failure']}"
        )
    return reply["items"]
