"""Tokenised strata to epochs of rows: caps, repeats, context, order; every dropped row counted."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from hrmtext.config.base import to_mapping
from hrmtext.config.data import SamplingConfig, StratumRule
from hrmtext.data.format import (
    INDEX_NAMES,
    METADATA_FILE,
    REPORT_FILE,
    STRATUM_FILE,
    TOKENS_FILE,
    Array,
    RowIndex,
    Stratum,
    read_stratum,
    read_tokenizer_info,
    save_array,
    stratum_folders,
)
from hrmtext.data.sources.local import stratum_label
from hrmtext.data.table import table_lines
from hrmtext.data.tokenizer import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from hrmtext.data.workers import Progress
from hrmtext.errors import DataError
from hrmtext.runtime.io import atomic_folder, fingerprint, write_json
from hrmtext.runtime.rng import numpy_generator

FORMAT_VERSION = 1
TOKENS_PER_COPY = 1 << 24

TOO_SHORT = "response too short"
NO_ROOM = "instruction leaves no room for a response"
TOO_SHORT_TRUNCATED = "response too short after truncation"
TOO_LONG = "row too long"


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
    tokens_per_epoch: float
    """Mean over the epochs."""
    covered_rows: int
    """Different rows that the epochs contain together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleReport:
    """What sampling did."""

    strata: dict[str, StratumReport]
    rows_per_epoch: int
    tokens_per_epoch: int
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

    Each stratum is walked in a random permutation that goes on from epoch to epoch and is drawn
    anew only when it is used up; then the rows of each epoch are shuffled. The result depends on
    the strata and the config only.

    Args:
        replace: allow `out` to exist; it is swapped when the new folder is whole.
        inputs: put into the completion marker, for callers that skip work already done.

    Raises:
        DataError: damaged strata, or no usable row.
        StorageError: `out` exists, or the disk is full.
    """
    tokenized = Path(tokenized)
    info = read_tokenizer_info(tokenized)
    strata = [read_stratum(folder) for folder in stratum_folders(tokenized)]
    with atomic_folder(
        out, replace=replace, format_version=FORMAT_VERSION, inputs=inputs
    ) as temporary:
        digest, bases = _copy_tokens(strata, info, temporary / TOKENS_FILE, progress)
        report = _write_epochs(strata, bases, [digest, info], config, temporary, progress)
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


def usable_rows(
    index: RowIndex, config: SamplingConfig, drop_long: bool
) -> tuple[RowIndex, Array, dict[str, int], int]:
    """Rows that fit the context, with their responses cut where they must be.

    Returns:
        The rows, the mask of those kept, rows dropped by reason, and how many rows kept were cut.
    """
    limit = config.max_seq_len + 1  # the last token is only predicted
    shortest = config.min_response_tokens
    room = limit - index.inst_len
    response = np.minimum(index.resp_len, np.maximum(room, 0))
    # Lengths are checked after the cut: a cut response can be too short as well.
    reasons = {TOO_SHORT: index.resp_len < shortest, NO_ROOM: room < 1}
    if drop_long:
        reasons[TOO_LONG] = index.resp_len > room
    else:
        reasons[TOO_SHORT_TRUNCATED] = response < shortest
    keep = np.ones(index.num_rows, dtype=bool)
    dropped = {}
    for reason, mask in reasons.items():
        count = int((mask & keep).sum())
        if count:
            dropped[reason] = count
        keep &= ~mask
    truncated = int((keep & (response < index.resp_len)).sum())
    return index._replace(resp_len=response).take(keep), keep, dropped, truncated


def walk(seed: int, stratum: str, num_rows: int, start: int, count: int) -> Array:
    """Rows `start` to `start + count` of the endless walk through a stratum.

    The walk is one random permutation of the `num_rows` rows after another.
    """
    pieces = []
    at = start
    while at < start + count:
        lap, offset = divmod(at, num_rows)
        take = min(num_rows - offset, start + count - at)
        order = numpy_generator(seed, "sample", stratum, lap).permutation(num_rows)
        pieces.append(order[offset : offset + take])
        at += take
    return np.concatenate(pieces) if pieces else np.empty(0, np.int64)


def rule_for(stratum: str, rules: tuple[StratumRule, ...]) -> StratumRule:
    """The first rule whose prefix fits, else one that takes the stratum whole."""
    for rule in rules:
        if stratum.startswith(rule.prefix):
            return rule
    return StratumRule(prefix="")


def _write_epochs(
    strata: list[Stratum],
    bases: list[int],
    fingerprint_parts: list[Any],
    config: SamplingConfig,
    folder: Path,
    progress: Progress | None,
) -> SampleReport:
    rules = [rule_for(stratum.name, config.rules) for stratum in strata]
    for rule in config.rules:
        if rule not in rules:
            known = ", ".join(stratum.name for stratum in strata[:10])
            raise DataError(
                f"sampling rule {rule.prefix!r} fits no stratum that an earlier rule does not "
                f"take; the strata begin with: {known}"
            )
    rows, reports = [], {}
    counts = []
    for stratum, rule, base in zip(strata, rules, bases, strict=True):
        drop_long = (rule.long_rows or config.long_rows) == "drop"
        kept, _, dropped, truncated = usable_rows(stratum.index, config, drop_long)
        rows.append(
            kept._replace(inst_start=kept.inst_start + base, resp_start=kept.resp_start + base)
        )
        count = min(kept.num_rows, rule.max_rows or kept.num_rows) * rule.repeat
        counts.append(count)
        walked = [
            walk(config.seed, stratum.name, kept.num_rows, e * count, count)
            for e in range(config.epochs)
        ]
        covered = np.zeros(kept.num_rows, dtype=bool)
        for which in walked:
            covered[which] = True
        total = sum(kept.take(which).num_tokens for which in walked)
        reports[stratum.name] = StratumReport(
            rows=stratum.index.num_rows,
            usable_rows=kept.num_rows,
            truncated_rows=truncated,
            dropped=dropped,
            rows_per_epoch=count,
            tokens_per_epoch=total / config.epochs,
            covered_rows=int(covered.sum()),
        )
    if not sum(counts):
        reasons = {name: report.dropped for name, report in reports.items()}
        raise DataError(f"no stratum has a usable row; dropped: {reasons}")

    stratum_ids = np.repeat(np.arange(len(strata), dtype=np.int32), counts)
    for epoch in range(config.epochs):
        parts = [
            index.take(walk(config.seed, stratum.name, index.num_rows, epoch * count, count))
            for stratum, index, count in zip(strata, rows, counts, strict=True)
        ]
        order = numpy_generator(config.seed, "epoch", epoch).permutation(len(stratum_ids))
        index = RowIndex(*(np.concatenate(arrays)[order] for arrays in zip(*parts, strict=True)))
        epoch_folder = folder / f"epoch_{epoch}"
        epoch_folder.mkdir()
        for name, array in zip(INDEX_NAMES, index, strict=True):
            save_array(epoch_folder / f"{name}.npy", array.astype(np.int64, copy=False))
        save_array(epoch_folder / STRATUM_FILE, stratum_ids[order])
        if progress is not None:
            progress("sampling epochs", epoch + 1, config.epochs)
    tokens = sum(report.tokens_per_epoch for report in reports.values())
    return SampleReport(
        strata=reports,
        rows_per_epoch=len(stratum_ids),
        tokens_per_epoch=round(tokens),
        epochs=config.epochs,
        fingerprint=fingerprint(*fingerprint_parts, list(reports), to_mapping(config)),
    )


def _copy_tokens(
    strata: list[Stratum], info: dict[str, Any], path: Path, progress: Progress | None
) -> tuple[str, list[int]]:
    """Lay the strata's tokens end to end; their digest, and where each stratum starts."""
    sizes = [len(stratum.tokens) for stratum in strata]
    vocab_size = info["vocab_size"]
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.int32
    bases = [sum(sizes[:i]) for i in range(len(sizes))]
    digest = hashlib.blake2b(digest_size=16)
    with path.open("wb") as stream:
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (sum(sizes),)}
        np.lib.format.write_array_header_1_0(stream, header)
        done = 0
        for stratum in strata:
            for at in range(0, len(stratum.tokens), TOKENS_PER_COPY):
                chunk = stratum.tokens[at : at + TOKENS_PER_COPY]
                if int(chunk.max()) >= vocab_size:
                    raise DataError(
                        f"{stratum.folder / TOKENS_FILE} holds token {int(chunk.max())}, but the "
                        f"tokenizer has {vocab_size} entries: it is from another tokenizer"
                    )
                data = chunk.astype(dtype).tobytes()
                digest.update(data)
                stream.write(data)
                done += len(chunk)
                if progress is not None:
                    progress("copying tokens", done, sum(sizes))
            # The same tokens cut into rows elsewhere are other data.
            for array in stratum.index:
                digest.update(array.tobytes())
    return digest.hexdigest(), bases
