"""Reasoning problems from reasoning-gym: a declared mix, train and held-out sharing no prompt.

Item i of seed s equals item i+1 of seed s-1 in reasoning-gym, so neighbouring seeds overlap.
Training and held-out rows therefore use far apart seeds, and prompts are compared as well.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from hrmtext.config.base import nearest, to_mapping
from hrmtext.config.data import FamilyConfig, ReasoningGymConfig
from hrmtext.data.example import Example, HeldOutRow, normalize_prompt
from hrmtext.data.format import REPORT_FILE, read_json
from hrmtext.data.heldout import read_held_out, write_held_out
from hrmtext.data.row_files import row_writer
from hrmtext.data.workers import Progress, WorkerPool
from hrmtext.errors import BackendError, ConfigError, DataError
from hrmtext.runtime.io import (
    atomic_folder,
    fingerprint,
    is_complete,
    require_complete,
    write_json,
)
from hrmtext.runtime.log import logger, warn_once
from hrmtext.runtime.rng import keyed_seed

ITEMS_PER_REQUEST = 500
HELD_OUT_SEED_DISTANCE = 2**30
"""Held-out seeds lie that far above training seeds, more than any family has rows."""
MAX_ATTEMPTS_PER_HELD_OUT_ROW = 20
WORKER = "hrmtext.data.sources.reasoning_gym_worker"
FORMAT_VERSION = 1
FOLDER = "reasoning_gym"
"""Name of the folder of its rows among those of the sources."""
HELD_OUT_FOLDER = ".heldout"
"""Within it; hidden, so that its files are no strata."""


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
    reports = {f.stratum: FamilyReport(family=f.name) for f in config.families}
    with WorkerPool(WORKER, config.num_workers or os.cpu_count() or 1) as pool:
        generator = _Generator(config, pool, progress)
        held_out = _generate_held_out(config, generator, reports)
        held_out_prompts = {
            normalize_prompt(row.instruction) for rows in held_out.values() for row in rows
        }
        train = _generate_train(config, generator, reports, held_out_prompts)
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


def collect_inputs(config: ReasoningGymConfig) -> str:
    """What the rows of a mix depend on; BackendError if reasoning-gym is not installed."""
    _require_reasoning_gym()
    mix = to_mapping(config)
    mix.pop("num_workers")
    return fingerprint(FORMAT_VERSION, mix, importlib.metadata.version("reasoning-gym"))


def collect(
    config: ReasoningGymConfig, out: Path, progress: Progress | None = None
) -> tuple[dict[str, Any], dict[str, list[HeldOutRow]]]:
    """`generate` into `out/<stratum>.jsonl`, unless that is up to date; report, held-out rows."""
    inputs = collect_inputs(config)
    if not (is_complete(out) and require_complete(out).get("inputs") == inputs):
        data = generate(config, progress)
        with atomic_folder(out, replace=True, inputs=inputs) as temporary:
            for name, rows in data.train.items():
                with row_writer(temporary / f"{name}.jsonl") as writer:
                    writer.write(rows)
            (temporary / HELD_OUT_FOLDER).mkdir()
            for name, held_out in data.held_out.items():
                write_held_out(temporary / HELD_OUT_FOLDER / f"{name}.jsonl", held_out)
            write_json(temporary / REPORT_FILE, data.report.to_mapping())
    held = {
        family.stratum: read_held_out(out / HELD_OUT_FOLDER / f"{family.stratum}.jsonl")
        for family in config.families
    }
    return read_json(out / REPORT_FILE), held


def score(
    family: str, entry: dict[str, Any], answer: str, config: dict[str, Any] | None = None
) -> float:
    """The family's own mark for `answer`, 0.0 to 1.0; a scorer that fails on it gives 0.0.

    Args:
        entry: `{"question", "answer", "metadata"}` of a held-out row.
        config: `settings` of the held-out row; None: the family's defaults.

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
    config: ReasoningGymConfig, generator: _Generator, reports: dict[str, FamilyReport]
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
        for (family, _, _), items in zip(wanted, generator.run(wanted, held_out=True), strict=True):
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
                        settings=family.config or None,
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
    generator: _Generator,
    reports: dict[str, FamilyReport],
    held_out_prompts: set[str],
) -> dict[str, list[Example]]:
    wanted = [
        (f, 0, size) for f, size in zip(config.families, config.sizes, strict=True) if size > 0
    ]
    train: dict[str, list[Example]] = {}
    for (family, _, _), items in zip(wanted, generator.run(wanted, held_out=False), strict=True):
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


class _Generator:
    """Asks worker processes for items and reports progress over the whole mix."""

    def __init__(
        self, config: ReasoningGymConfig, pool: WorkerPool, progress: Progress | None
    ) -> None:
        self.config, self.pool, self.progress = config, pool, progress
        self.done, self.total = 0, sum(config.sizes) + sum(config.eval_sizes)
        names = [family.stratum for family in config.families]
        attempts = [MAX_ATTEMPTS_PER_HELD_OUT_ROW * size for size in config.eval_sizes]
        self.sizes = {
            False: dict(zip(names, config.sizes, strict=True)),
            True: dict(zip(names, attempts, strict=True)),
        }

    def run(
        self, wanted: Sequence[tuple[FamilyConfig, int, int]], *, held_out: bool
    ) -> list[list[Any]]:
        """Items [start, stop) of each wanted family, in order."""
        requests, owners = [], []
        for owner, (family, start, stop) in enumerate(wanted):
            # Room for both kinds of rows below the 32 bits that some families allow.
            seed = keyed_seed(self.config.seed, "reasoning-gym", family.stratum) % 2**30
            for at in range(start, stop, ITEMS_PER_REQUEST):
                owners.append(owner)
                requests.append(
                    {
                        "what": f"family {family.stratum!r}",
                        "family": family.name,
                        "config": family.config,
                        "seed": seed + (HELD_OUT_SEED_DISTANCE if held_out else 0),
                        # Some families draw a plan of this length when they are created.
                        "size": self.sizes[held_out][family.stratum],
                        "start": at,
                        "stop": min(at + ITEMS_PER_REQUEST, stop),
                        "with_metadata": held_out,
                    }
                )

        def advance(index: int) -> None:
            self.done += requests[index]["stop"] - requests[index]["start"]
            if self.progress is not None:
                self.progress("generating rows", min(self.done, self.total), self.total)

        items: list[list[Any]] = [[] for _ in wanted]
        for owner, answer in zip(owners, self.pool.ask(requests, advance), strict=True):
            items[owner].extend(answer)
        return items
