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


def _inspect_sampled(path: Path, epoch: int) -> Summary:
    data = SampledData.open(path)
    index, ids = data.epoch(epoch), data.stratum_ids(epoch)
    strata = {}
    if ids is None:
        strata["(not recorded)"] = _stratum(index)
    else:
        for number, name in enumerate(data.strata()):
            strata[stratum_label(name)] = _stratum(index.take(ids == number))
    return _summary(
        "sampled",
        strata,
        index.inst_len + index.resp_len,
        count_conditions(data.tokens, index, condition_names(data.info)),
        facts={
            "epoch": f"{epoch} of {data.num_epochs}",
            "context": data.max_seq_len,
            "vocabulary": f"{data.info['vocab_size']:,}, padded {data.vocab_size:,}",
            "fingerprint": data.fingerprint,
            **_turns_fact(index.num_rows, _earlier_turns(index)),
        },
    )


def _inspect_tokenized(path: Path) -> Summary:
    info = read_tokenizer_info(path)
    names = condition_names(info)
    strata, lengths, earlier = {}, [], 0
    conditions: collections.Counter[str] = collections.Counter()
    problems: collections.Counter[str] = collections.Counter()
    for folder in stratum_folders(path):
        stratum = read_stratum(folder)
        strata[stratum_label(stratum.name)] = _stratum(stratum.index)
        lengths.append(stratum.index.inst_len + stratum.index.resp_len)
        conditions.update(count_conditions(stratum.tokens, stratum.index, names))
        earlier += _earlier_turns(stratum.index)
        for reason, problem in stratum.marker.get("dropped", {}).items():
            problems[reason] += problem["rows"]
    all_lengths = np.concatenate(lengths)
    facts = {"vocabulary": f"{info['vocab_size']:,}", **_turns_fact(len(all_lengths), earlier)}
    return _summary("tokenised", strata, all_lengths, conditions, problems, facts)


def _inspect_rows(path: Path) -> Summary:
    strata, lengths, earlier = {}, [], 0
    conditions: collections.Counter[str] = collections.Counter()
    problems: collections.Counter[str] = collections.Counter()
    for name, file in find_files(path).items():
        found = RowProblems()
        rows = prompts = responses = 0
        for batch in read_batches(file, found):
            sizes = [
                (
                    len(row.instruction) + sum(len(turn[0]) + len(turn[1]) for turn in row.history),
                    len(row.response),
                )
                for row in batch
            ]
            conditions.update(row.condition for row in batch)
            earlier += sum(len(row.history) for row in batch)
            rows += len(batch)
            prompts += sum(size[0] for size in sizes)
            responses += sum(size[1] for size in sizes)
            lengths.append(np.array([sum(size) for size in sizes], dtype=np.int64))
        problems.update(found.counts)
        strata[stratum_label(name)] = StratumSummary(
            rows=rows, prompt_units=prompts, response_units=responses
        )
    all_lengths = np.concatenate([np.empty(0, np.int64), *lengths])
    facts = _turns_fact(len(all_lengths), earlier)
    return _summary("cleaned", strata, all_lengths, conditions, problems, facts, "characters")


def _earlier_turns(index: RowIndex) -> int:
    return int(index.extras[TURN_COUNT].sum()) if TURN_COUNT in index.extras else 0


def _turns_fact(num_rows: int, earlier: int) -> dict[str, Any]:
    """How many turns there are; nothing where every row has one."""
    if not earlier:
        return {}
    turns = num_rows + earlier
    return {"turns": f"{turns:,} ({turns / num_rows:.1f} a row)"}


def _summary(
    kind: str,
    strata: dict[str, StratumSummary],
    lengths: Array,
    conditions: dict[str, int],
    problems: dict[str, int] | None = None,
    facts: dict[str, Any] | None = None,
    unit: str = "tokens",
) -> Summary:
    shown = np.percentile(lengths, PERCENTILES, method="nearest") if len(lengths) else []
    return Summary(
        kind=kind,
        unit=unit,
        rows=len(lengths),
        units=int(lengths.sum()),
        strata=strata,
        conditions=dict(sorted(conditions.items(), key=lambda item: (-item[1], item[0]))),
        lengths=dict(zip(PERCENTILES, (int(v) for v in shown), strict=False)),
        problems=dict(problems or {}),
        facts=facts or {},
    )


def _stratum(index: RowIndex) -> StratumSummary:
    return StratumSummary(
        rows=index.num_rows,
        prompt_units=int(index.inst_len.sum()),
        response_units=int(index.resp_len.sum()),
    )


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
