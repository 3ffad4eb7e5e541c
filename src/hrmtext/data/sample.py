"""Tokenised strata to epochs of rows: caps, repeats, context, order; every dropped row counted."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hrmtext.config.base import to_mapping
from hrmtext.config.data import SamplingConfig, StratumRule
from hrmtext.data.arrays import Array, ArrayWriter
from hrmtext.data.contamination import ContaminationFilter, benchmark_ngrams
from hrmtext.data.format import (
    INDEX_NAMES,
    METADATA_FILE,
    REPORT_FILE,
    STRATUM_FILE,
    read_stratum,
    read_tokenizer_info,
    stratum_folders,
)
from hrmtext.data.gather import ROW, Gathered, num_tokens
from hrmtext.data.lengths import LengthCheck
from hrmtext.data.mixture import Walk
from hrmtext.data.shuffle import Shuffle
from hrmtext.data.sources.local import stratum_label
from hrmtext.data.table import table_lines
from hrmtext.data.tokenizer import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, PromptTokenizer
from hrmtext.data.workers import Progress
from hrmtext.errors import DataError
from hrmtext.runtime.io import atomic_folder, exclusive, fingerprint, write_json

FORMAT_VERSION = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class StratumReport:
    """What sampling took from one stratum."""

    rows: int
    """Rows of the stratum."""
    usable_rows: int
    """Rows left after the checks of length."""
    truncated_rows: int
    """Usable rows whose response was cut; it ends without its end token."""
    dropped: dict[str, int]
    """Rows not usable, by reason."""
    rows_per_epoch: int
    """Mean over the epochs; equal in all of them unless a budget of tokens decides."""
    tokens_per_epoch: float
    """Mean over the epochs."""
    covered_rows: int
    """Different rows that the epochs contain together."""
    covered_tokens: int
    """Tokens of these rows, once each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceReport:
    """What sampling took from strata with a common budget of tokens."""

    usable_tokens: int
    """Tokens of all usable rows, once each."""
    planned_tokens: int
    """The budget of an epoch."""
    epoch_tokens: tuple[int, ...]
    """Tokens taken in each epoch."""
    epoch_rows: tuple[int, ...]
    """Rows taken in each epoch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleReport:
    """What sampling did."""

    strata: dict[str, StratumReport]
    sources: dict[str, SourceReport]
    """By prefix, the sources with a budget of tokens."""
    rows_per_epoch: int
    """Mean over the epochs."""
    tokens_per_epoch: int
    """Mean over the epochs."""
    epoch_rows: tuple[int, ...]
    """Rows of each epoch."""
    epoch_tokens: tuple[int, ...]
    """Tokens of each epoch."""
    epochs: int
    fingerprint: str

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    def text(self) -> str:
        """A table for the terminal: what each stratum gives an epoch, and what was dropped."""
        table: list[tuple[str, ...]] = [
            ("stratum", "rows", "usable", "truncated", "rows/epoch", "tokens/epoch", "covered")
        ]
        for name, stratum in self.strata.items():
            counts = (
                stratum.rows, stratum.usable_rows, stratum.truncated_rows, stratum.rows_per_epoch,
                round(stratum.tokens_per_epoch), stratum.covered_rows,
            )  # fmt: skip
            table.append((stratum_label(name), *(f"{count:,}" for count in counts)))
        lines = [
            f"{self.epochs} epochs of {self.rows_per_epoch:,} rows, {self.tokens_per_epoch:,} "
            "tokens on average",
            *table_lines(table),
        ]
        for prefix, source in self.sources.items():
            realised = ", ".join(f"{count:,}" for count in source.epoch_tokens)
            lines.append(
                f"source {prefix!r}: {source.planned_tokens:,} tokens an epoch planned, {realised} "
                f"taken, of {source.usable_tokens:,} different ones"
            )
        for name, stratum in self.strata.items():
            for reason, count in stratum.dropped.items():
                lines.append(f"dropped from {stratum_label(name)}: {count:,} rows: {reason}")
        return "\n".join(lines)


def sample(
    tokenized: str | Path,
    out: str | Path,
    config: SamplingConfig,
    *,
    replace: bool = False,
    inputs: str = "",
    progress: Progress | None = None,
) -> SampleReport:
    """Write `config.epochs` epochs of rows drawn from a tokenised folder.

    A stratum (or, where a rule gives a budget of tokens, all strata of the rule together) is walked
    in a random order that goes on from epoch to epoch and is drawn anew only when it is used up;
    then the rows of each epoch are shuffled. The result depends on the strata and the config only;
    a budget takes the same rows however they are spread over files. Memory does not grow with the
    number of rows or tokens.

    Args:
        replace: allow `out` to exist; it is swapped when the new folder is whole.
        inputs: put into the completion marker, for callers that skip work already done.

    Raises:
        DataError: damaged strata, or no usable row.
        StorageError: `out` exists, another process writes it, or the disk is full.
    """
    tokenized = Path(tokenized)
    info = read_tokenizer_info(tokenized)
    folders = stratum_folders(tokenized)
    sources = group_strata([folder.name for folder in folders], config)
    rules = {number: source.rule for source in sources for number in source.strata}
    benchmarks = None
    if (asked := config.decontaminate) is not None:
        encoder = PromptTokenizer.load(tokenized)
        benchmarks = benchmark_ngrams(asked.files, asked.ngram_tokens, encoder)
    with (
        exclusive(out),
        atomic_folder(
            out, replace=replace, format_version=FORMAT_VERSION, inputs=inputs
        ) as temporary,
    ):
        with Gathered(temporary, info["vocab_size"]) as gathered:
            lengths = []
            for number, folder in enumerate(folders):
                stratum = read_stratum(folder)
                check = LengthCheck(
                    config, rules[number].long_rows or config.long_rows, stratum.turns
                )
                if benchmarks is not None:
                    check.also = ContaminationFilter(benchmarks, stratum.tokens, check.dropped)
                gathered.add(stratum, check, by_content=rules[number].by_tokens)
                lengths.append(check)
                if progress is not None:
                    progress("gathering strata", number + 1, len(folders))
            drawn = _write_epochs(gathered, sources, config, temporary, progress)
        report = _report(gathered, sources, lengths, drawn, info, config)
        write_json(
            temporary / METADATA_FILE,
            {
                "tokenizer_info": info,
                "vocab_size": None,
                "max_seq_len": config.max_seq_len + 1,
                "total_length": report.tokens_per_epoch,
            },
        )
        write_json(temporary / REPORT_FILE, report.to_mapping())
        for name in (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE):
            if (tokenized / name).is_file():
                shutil.copyfile(tokenized / name, temporary / name)
    return report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Strata that are walked as one."""

    name: str
    """The rule's prefix where it is a budget of tokens, else the stratum's name."""
    strata: tuple[int, ...]
    """Their numbers."""
    rule: StratumRule

    def per_epoch(self, gathered: Gathered, config: SamplingConfig) -> tuple[int, int]:
        """How far an epoch and a lap carry its walk, in tokens for budgets, else in rows."""
        if self.rule.by_tokens:
            budget = config.budget(self.rule)
            assert budget is not None, "a rule by tokens has a budget"
            return budget, sum(gathered.num_tokens[number] for number in self.strata)
        rows = sum(gathered.num_rows[number] for number in self.strata)
        return min(rows, self.rule.max_rows or rows) * self.rule.repeat, rows


def group_strata(names: Sequence[str], config: SamplingConfig) -> list[Source]:
    """Strata by the walk that they belong to; one without a rule is taken whole.

    Raises:
        DataError: a rule that no stratum falls to.
    """
    groups: dict[tuple[str, int | None], list[int]] = {}
    used = set()
    for number, name in enumerate(names):
        fits = (i for i, rule in enumerate(config.rules) if name.startswith(rule.prefix))
        which = next(fits, None)
        used.add(which)
        by_tokens = which is not None and config.rules[which].by_tokens
        key = config.rules[which].prefix if which is not None and by_tokens else name
        groups.setdefault((key, which), []).append(number)
    for which, rule in enumerate(config.rules):
        if which not in used:
            raise DataError(
                f"sampling rule {rule.prefix!r} fits no stratum that an earlier rule does not "
                f"take; the strata begin with: {', '.join(names[:10])}"
            )
    return [
        Source(
            name=name,
            strata=tuple(numbers),
            rule=StratumRule(prefix="") if which is None else config.rules[which],
        )
        for (name, which), numbers in groups.items()
    ]


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """(epochs, strata) what the epochs hold, and (2, strata) rows and tokens of the first lap."""

    rows: Array
    tokens: Array
    first_lap: Array


def _write_epochs(
    gathered: Gathered,
    sources: list[Source],
    config: SamplingConfig,
    folder: Path,
    progress: Progress | None,
) -> _Drawn:
    shape = (config.epochs, len(gathered.names))
    drawn = _Drawn(
        np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros((2, shape[1]), int)
    )
    walks = []
    for source in sources:
        step, length = source.per_epoch(gathered, config)
        if length == 0 and source.rule.by_tokens:
            raise DataError(f"source {source.name!r} has a budget of tokens, but no usable row")
        by_tokens, strata = source.rule.by_tokens, source.strata
        pieces = functools.partial(gathered.pieces, strata, by_tokens=by_tokens)
        if length and step:
            walk = Walk(config.seed, source.name, pieces, length)
            mean = length / sum(gathered.num_rows[number] for number in strata)
            walks.append((walk, step, round(step / mean)))
    expected = sum(rows for _, _, rows in walks)
    starts = [walk.cut(0) for walk, _, _ in walks]
    for epoch in range(config.epochs):
        epoch_folder = folder / f"epoch_{epoch}"
        epoch_folder.mkdir()
        with Shuffle(epoch_folder, ROW, expected, config.seed, "epoch", epoch) as shuffle:
            for number, (walk, step, _) in enumerate(walks):
                stop = walk.cut((epoch + 1) * step)
                for piece, lap, which in walk.between(starts[number], stop):
                    rows = piece.rows() if which is None else piece.rows()[which]
                    shuffle.add(rows)
                    drawn.rows[epoch, piece.stratum] += len(rows)
                    tokens = int(num_tokens(rows).sum())
                    drawn.tokens[epoch, piece.stratum] += tokens
                    if lap == 0:
                        drawn.first_lap[:, piece.stratum] += (len(rows), tokens)
                starts[number] = stop
            if not drawn.rows[epoch].any():
                raise DataError(
                    f"epoch {epoch} has no row: no stratum has a usable row, or the budgets are "
                    "smaller than one row"
                )
            _write_rows(epoch_folder, shuffle, gathered.extra_names)
        if progress is not None:
            progress("sampling epochs", epoch + 1, config.epochs)
    return drawn


def _write_rows(folder: Path, chunks: Iterable[Array], extra_names: set[str]) -> None:
    columns = dict.fromkeys((*INDEX_NAMES, *sorted(extra_names)), np.int64)
    with contextlib.ExitStack() as stack:
        writers = {
            name: stack.enter_context(ArrayWriter(folder / f"{name}.npy", dtype))
            for name, dtype in columns.items()
        }
        stratum = stack.enter_context(ArrayWriter(folder / STRATUM_FILE, np.int32))
        for chunk in chunks:
            for name, writer in writers.items():
                writer.write(chunk[name])
            stratum.write(chunk["stratum"])


def _report(
    gathered: Gathered,
    sources: list[Source],
    lengths: list[LengthCheck],
    drawn: _Drawn,
    info: dict[str, Any],
    config: SamplingConfig,
) -> SampleReport:
    strata = {}
    for number, (name, check) in enumerate(zip(gathered.names, lengths, strict=True)):
        total = int(drawn.rows[:, number].sum())
        strata[name] = StratumReport(
            rows=check.num_rows,
            usable_rows=gathered.num_rows[number],
            truncated_rows=check.num_truncated,
            dropped=check.dropped,
            rows_per_epoch=round(total / config.epochs),
            tokens_per_epoch=int(drawn.tokens[:, number].sum()) / config.epochs,
            covered_rows=int(drawn.first_lap[0, number]),
            covered_tokens=int(drawn.first_lap[1, number]),
        )
    budgets = {}
    for source in sources:
        if source.rule.by_tokens:
            step, length = source.per_epoch(gathered, config)
            which = list(source.strata)
            budgets[source.name] = SourceReport(
                usable_tokens=length,
                planned_tokens=step,
                epoch_tokens=tuple(drawn.tokens[:, which].sum(1).tolist()),
                epoch_rows=tuple(drawn.rows[:, which].sum(1).tolist()),
            )
    return SampleReport(
        strata=strata,
        sources=budgets,
        rows_per_epoch=round(int(drawn.rows.sum()) / config.epochs),
        tokens_per_epoch=round(int(drawn.tokens.sum()) / config.epochs),
        epoch_rows=tuple(drawn.rows.sum(1).tolist()),
        epoch_tokens=tuple(drawn.tokens.sum(1).tolist()),
        epochs=config.epochs,
        fingerprint=fingerprint(gathered.digest, info, gathered.names, to_mapping(config)),
    )
