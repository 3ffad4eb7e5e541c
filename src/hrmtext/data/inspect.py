"""What a data folder holds: rows, tokens, lengths, conditions, strata."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from hrmtext.data.arrays import Array
from hrmtext.data.format import (
    METADATA_FILE,
    TOKENIZER_INFO_FILE,
    RowIndex,
    SampledData,
    read_json,
    read_stratum,
    read_tokenizer_info,
    stratum_folders,
)
from hrmtext.data.heldout import SAMPLED_KEY, condition_names
from hrmtext.data.sources.local import RowProblems, find_files, read_batches, stratum_label
from hrmtext.data.table import table_lines
from hrmtext.data.turns import TURN_COUNT
from hrmtext.errors import DataError

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
ROWS_PER_CHUNK = 1 << 16
MAX_CONDITIONS = 8
"""Condition tokens looked at after the start of a prompt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StratumSummary:
    """One line of the table."""

    rows: int
    prompt_units: int
    """Tokens (or characters, of rows not yet tokenised) of all prompts."""
    response_units: int
    """The same of all responses."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What a folder holds."""

    kind: str
    """prepared, cleaned, tokenised or sampled."""
    unit: str
    """What lengths are counted in: tokens or characters."""
    rows: int
    units: int
    """Tokens or characters of prompts and responses together."""
    strata: dict[str, StratumSummary]
    conditions: dict[str, int]
    """Rows by condition; empty: no condition token."""
    lengths: dict[int, int]
    """Percentile -> length of a whole row."""
    problems: dict[str, int] = dataclasses.field(default_factory=dict)
    """Rows that cannot be used, by reason."""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Epochs, context, vocabulary, where the folder states them."""

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    def text(self, max_strata: int = 40) -> str:
        """A table for the terminal; at most `max_strata` strata, the largest first."""
        lines = [f"{self.kind}: {self.rows:,} rows, {self.units:,} {self.unit}"]
        lines += [f"{name}: {value}" for name, value in self.facts.items()]
        percentiles = "  ".join(f"p{p} {length:,}" for p, length in self.lengths.items())
        lines += [f"row length in {self.unit}: {percentiles}", ""]
        table: list[tuple[str, ...]] = [
            ("stratum", "rows", "share", f"prompt {self.unit}", f"response {self.unit}")
        ]
        ranked = sorted(
            self.strata.items(), key=lambda s: (-s[1].prompt_units - s[1].response_units, s[0])
        )
        for name, stratum in ranked[:max_strata]:
            units = stratum.prompt_units + stratum.response_units
            table.append(
                (
                    name, f"{stratum.rows:,}", f"{units / max(1, self.units):.1%}",
                    f"{stratum.prompt_units:,}", f"{stratum.response_units:,}",
                )
            )  # fmt: skip
        lines += table_lines(table)
        if len(ranked) > max_strata:
            lines.append(f"... and {len(ranked) - max_strata} more")
        lines += ["", *table_lines([("condition", "rows"), *_counts(self.conditions)])]
        if self.problems:
            lines += ["", *table_lines([("cannot be used", "rows"), *_counts(self.problems)])]
        return "\n".join(lines)


def inspect(path: str | Path, epoch: int = 0) -> Summary:
    """Summarise a prepared, sampled, tokenised or cleaned folder, or one JSONL or Parquet file.

    Args:
        epoch: which epoch of a sampled folder.

    Raises:
        DataError: nothing known is there, or it is damaged.
    """
    path = Path(path)
    if (path / "sampled").is_dir():
        summary = inspect(path / "sampled", epoch)
        return dataclasses.replace(summary, kind="prepared, sampled epoch")
    if (path / METADATA_FILE).is_file() and SAMPLED_KEY in read_json(path / METADATA_FILE):
        return _inspect_sampled(path, epoch)
    if (path / TOKENIZER_INFO_FILE).is_file():
        return _inspect_tokenized(path)
    if (path / METADATA_FILE).is_file():
        raise DataError(f"{path} is one stratum; inspect the tokenised folder above it")
    return _inspect_rows(path)


class _Count:
    """Sums over rows that are seen a piece at a time; memory grows with the longest row only."""

    def __init__(self) -> None:
        self.rows = self.prompts = self.responses = self.earlier = 0
        self.lengths = np.zeros(1, dtype=np.int64)
        """Rows by length."""
        self.conditions: collections.Counter[str] = collections.Counter()

    def add(self, prompts: Array, responses: Array) -> None:
        """Count rows by their lengths."""
        self.rows += len(prompts)
        self.prompts += int(prompts.sum())
        self.responses += int(responses.sum())
        if len(prompts):
            counts = np.bincount((prompts + responses).astype(np.int64))
            if len(counts) > len(self.lengths):
                self.lengths, counts = counts, self.lengths
            self.lengths[: len(counts)] += counts

    def percentiles(self) -> dict[int, int]:
        """Percentile -> length of the row nearest to it."""
        if not self.rows:
            return {}
        below = np.cumsum(self.lengths)  # rows up to each length
        ranks = np.rint(np.array(PERCENTILES) / 100 * (self.rows - 1))
        lengths = np.searchsorted(below, ranks, side="right")
        return dict(zip(PERCENTILES, lengths.tolist(), strict=True))

    def summary(self, kind: str, strata: dict[str, StratumSummary], **more: Any) -> Summary:
        """The summary of all that was counted."""
        conditions = sorted(self.conditions.items(), key=lambda item: (-item[1], item[0]))
        facts = more.pop("facts", {})
        if self.earlier:
            turns = self.rows + self.earlier
            facts = {**facts, "turns": f"{turns:,} ({turns / self.rows:.1f} a row)"}
        return Summary(
            kind=kind,
            unit=more.pop("unit", "tokens"),
            rows=self.rows,
            units=self.prompts + self.responses,
            strata=strata,
            conditions=dict(conditions),
            lengths=self.percentiles(),
            facts=facts,
            **more,
        )


def _inspect_sampled(path: Path, epoch: int) -> Summary:
    data = SampledData.open(path)
    index, ids = data.epoch(epoch), data.stratum_ids(epoch)
    names = ["(not recorded)"] if ids is None else [stratum_label(n) for n in data.strata()]
    conditions = condition_names(data.info)
    count = _Count()
    sums = np.zeros((3, len(names)), dtype=np.int64)
    for at in range(0, index.num_rows, ROWS_PER_CHUNK):
        part = index.take(slice(at, at + ROWS_PER_CHUNK))
        _add_index(count, part, data.tokens, conditions)
        which = np.zeros(part.num_rows, np.int64) if ids is None else ids[at : at + part.num_rows]
        for number, values in enumerate((None, part.inst_len, part.resp_len)):
            # Sums in floats are exact here: a piece's are far below 2^53.
            found = np.bincount(which, values, minlength=len(names))
            sums[number] += found.astype(np.int64)
    strata = {
        name: StratumSummary(rows=rows, prompt_units=prompts, response_units=responses)
        for name, (rows, prompts, responses) in zip(names, sums.T.tolist(), strict=True)
    }
    facts = {
        "epoch": f"{epoch} of {data.num_epochs}",
        "context": data.max_seq_len,
        "vocabulary": f"{data.info['vocab_size']:,}, padded {data.vocab_size:,}",
        "fingerprint": data.fingerprint,
    }
    return count.summary("sampled", strata, facts=facts)


def _inspect_tokenized(path: Path) -> Summary:
    info = read_tokenizer_info(path)
    conditions = condition_names(info)
    strata = {}
    problems: collections.Counter[str] = collections.Counter()
    count = _Count()
    for folder in stratum_folders(path):
        stratum = read_stratum(folder)
        before = count.prompts, count.responses
        for at in range(0, stratum.index.num_rows, ROWS_PER_CHUNK):
            part = stratum.index.take(slice(at, at + ROWS_PER_CHUNK))
            _add_index(count, part, stratum.tokens, conditions)
        strata[stratum_label(stratum.name)] = StratumSummary(
            rows=stratum.index.num_rows,
            prompt_units=count.prompts - before[0],
            response_units=count.responses - before[1],
        )
        for reason, problem in stratum.marker.get("dropped", {}).items():
            problems[reason] += problem["rows"]
    facts = {"vocabulary": f"{info['vocab_size']:,}"}
    return count.summary("tokenised", strata, problems=dict(problems), facts=facts)


def _add_index(count: _Count, index: RowIndex, tokens: Array, names: dict[int, str]) -> None:
    count.add(index.inst_len, index.resp_len)
    count.conditions.update(count_conditions(tokens, index, names))
    if TURN_COUNT in index.extras:
        count.earlier += int(index.extras[TURN_COUNT].sum())


def _inspect_rows(path: Path) -> Summary:
    strata = {}
    problems: collections.Counter[str] = collections.Counter()
    count = _Count()
    for name, file in find_files(path).items():
        found = RowProblems()
        before = count.rows, count.prompts, count.responses
        for batch in read_batches(file, found):
            prompts = [
                len(row.instruction) + sum(len(turn[0]) + len(turn[1]) for turn in row.history)
                for row in batch
            ]
            count.add(np.array(prompts), np.array([len(row.response) for row in batch]))
            count.conditions.update(row.condition for row in batch)
            count.earlier += sum(len(row.history) for row in batch)
        problems.update(found.counts)
        strata[stratum_label(name)] = StratumSummary(
            rows=count.rows - before[0],
            prompt_units=count.prompts - before[1],
            response_units=count.responses - before[2],
        )
    return count.summary("cleaned", strata, unit="characters", problems=dict(problems))


def count_conditions(tokens: Array, index: RowIndex, names: dict[int, str]) -> dict[str, int]:
    """Rows by condition, read from the tokens after each prompt's start."""
    if not index.num_rows:
        return {}
    depth = np.minimum(MAX_CONDITIONS, index.inst_len - 1)  # (R)
    heads = np.full((index.num_rows, MAX_CONDITIONS), -1, dtype=np.int64)  # (R, C)
    known = np.array(sorted(names), dtype=np.int64)
    open_rows = np.ones(index.num_rows, dtype=bool)
    for at in range(MAX_CONDITIONS):
        open_rows &= depth > at
        values = tokens[index.inst_start[open_rows] + 1 + at].astype(np.int64)
        is_condition = np.isin(values, known)
        which = np.flatnonzero(open_rows)
        heads[which[is_condition], at] = values[is_condition]
        open_rows[which[~is_condition]] = False
    patterns, counts = np.unique(heads, axis=0, return_counts=True)
    return {
        ",".join(names[token] for token in pattern if token >= 0): int(count)
        for pattern, count in zip(patterns.tolist(), counts, strict=True)
    }


def _counts(counts: dict[str, int]) -> Iterable[tuple[str, str]]:
    return ((name or "(none)", f"{count:,}") for name, count in counts.items())
