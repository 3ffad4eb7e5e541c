"""The figures of a data report, read from a prepared folder piece by piece."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hrmtext.config.base import load
from hrmtext.config.data import DataConfig
from hrmtext.data.format import (
    REPORT_FILE,
    SampledData,
    read_json,
    read_stratum,
    read_tokenizer_info,
    stratum_folders,
)
from hrmtext.data.heldout import condition_names
from hrmtext.data.inspect import count_conditions
from hrmtext.data.pack import plan_epoch
from hrmtext.data.report.audit import AUDITS_FOLDER
from hrmtext.data.report.vocabulary import KINDS, Vocabulary
from hrmtext.data.sample import group_strata
from hrmtext.data.sources.local import stratum_label
from hrmtext.data.tokenizer import PromptTokenizer
from hrmtext.data.workers import Progress
from hrmtext.errors import DataError

CONFIG_FILE = "data.yaml"
STAGES = ("generating", "source's rule", "reading", "cleaning", "tokenising", "sampling")
"""Where rows are left out, in order."""
OCTAVES = 32
"""Bars of a histogram of lengths: 1, 2-3, 4-7, ... tokens."""
ROWS_PER_CHUNK = 1 << 18
TOKENS_PER_CHUNK = 1 << 22
PACKED_ROWS = 1_000_000
"""Rows that packing is tried on; those of an epoch are shuffled."""
BINS = ((1, 1), (4, 1), (8, 8))
"""Sizes of a batch tried, in contexts, and the bins that it is divided into."""

Counts = npt.NDArray[np.int64]


@dataclasses.dataclass(kw_only=True)
class Scan:
    """What the tokenised and sampled rows hold. S strata, E epochs, V entries, K kinds."""

    strata: list[str] = dataclasses.field(default_factory=list)
    """Labels of the tokenised strata."""
    rows: list[int] = dataclasses.field(default_factory=list)
    prompt_tokens: list[int] = dataclasses.field(default_factory=list)
    response_tokens: list[int] = dataclasses.field(default_factory=list)
    kinds: list[Counts] = dataclasses.field(default_factory=list)
    """(S) of (2, K) tokens and bytes of each kind of entry."""
    prompt_lengths: Counts = dataclasses.field(default_factory=lambda: np.zeros(OCTAVES, np.int64))
    """(OCTAVES) rows by length of the prompt."""
    response_lengths: Counts = dataclasses.field(
        default_factory=lambda: np.zeros(OCTAVES, np.int64)
    )
    conditions: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    vocabulary: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedReport:
    """All that the page tells."""

    folder: Path
    config: DataConfig
    stages: dict[str, Any]
    """`report.json` of `prepare`."""
    fingerprint: str
    """That training records."""
    scan: Scan
    epoch_rows: Counts
    """(E, S) rows of each stratum; S in the order of `sampled`."""
    epoch_tokens: Counts
    """(E, S)"""
    packing: list[dict[str, Any]]
    mixture: list[dict[str, Any]]
    """One a source of the mixture: what was planned and what is there."""
    audits: dict[str, Any]
    """Contamination audits by the name of their file."""

    @property
    def sampled_strata(self) -> list[str]:
        """Names of the strata in the order of `epoch_rows`."""
        return list(self.stages["sampled"]["strata"])

    @property
    def unique_tokens(self) -> int | None:
        """Different tokens in all epochs together; None where sampling did not record it."""
        counts = [s.get("covered_tokens") for s in self.stages["sampled"]["strata"].values()]
        return None if None in counts else sum(counts)

    @property
    def drops(self) -> list[tuple[str, str, int]]:
        """(stage, reason, rows), the most rows first within a stage."""
        return count_drops(self.stages)


def collect(folder: str | Path, progress: Progress | None = None) -> PreparedReport:
    """Read a prepared folder. Memory does not grow with its rows or tokens.

    Raises:
        DataError: not a prepared folder, or a damaged one.
    """
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file() or not (folder / "sampled").is_dir():
        raise DataError(
            f"{folder} is not a prepared folder ({CONFIG_FILE} or sampled/ is missing); name the "
            "folder that `hrm-text data prepare` wrote to"
        )
    config = load(DataConfig, folder / CONFIG_FILE)
    stages = read_json(folder / REPORT_FILE)
    data = SampledData.open(folder / "sampled")
    scan = scan_strata(folder / "tokenized", progress)
    rows, tokens = scan_epochs(data, progress)
    audits = {
        path.stem: read_json(path) for path in sorted((folder / AUDITS_FOLDER).glob("*.json"))
    }
    return PreparedReport(
        folder=folder, config=config, stages=stages, fingerprint=data.fingerprint, scan=scan,
        epoch_rows=rows, epoch_tokens=tokens, packing=try_packing(data),
        mixture=compare_mixture(config, stages["sampled"], rows, tokens), audits=audits,
    )  # fmt: skip


def source_of(stratum: str) -> str:
    """The source that a stratum's name begins with: all before the first `__`."""
    return stratum_label(stratum).partition("__")[0]


def scan_strata(folder: Path, progress: Progress | None = None) -> Scan:
    """Read every tokenised stratum once."""
    names = condition_names(read_tokenizer_info(folder))
    vocabulary = Vocabulary(PromptTokenizer.load(folder))
    scan = Scan()
    total = np.zeros(len(vocabulary.texts), dtype=np.int64)
    folders = stratum_folders(folder)
    for number, place in enumerate(folders):
        stratum = read_stratum(place)
        prompts = responses = 0
        for at in range(0, stratum.index.num_rows, ROWS_PER_CHUNK):
            part = stratum.index.take(slice(at, at + ROWS_PER_CHUNK))
            scan.prompt_lengths += octaves(part.inst_len)
            scan.response_lengths += octaves(part.resp_len)
            prompts += int(part.inst_len.sum())
            responses += int(part.resp_len.sum())
            scan.conditions.update(count_conditions(stratum.tokens, part, names))
        counts = np.zeros(len(total), dtype=np.int64)
        for at in range(0, len(stratum.tokens), TOKENS_PER_CHUNK):
            chunk = stratum.tokens[at : at + TOKENS_PER_CHUNK].astype(np.int64)
            if len(chunk) and int(chunk.max()) >= len(total):
                raise DataError(
                    f"{place} holds token {int(chunk.max())}, but its tokenizer has {len(total)} "
                    "entries; run `hrm-text data prepare` again"
                )
            counts += np.bincount(chunk, minlength=len(total))
        total += counts
        scan.strata.append(stratum_label(stratum.name))
        scan.rows.append(stratum.index.num_rows)
        scan.prompt_tokens.append(prompts)
        scan.response_tokens.append(responses)
        scan.kinds.append(vocabulary.by_kind(counts))
        if progress is not None:
            progress("reading strata", number + 1, len(folders))
    scan.vocabulary = vocabulary.report(total)
    return scan


def octaves(lengths: npt.NDArray[Any]) -> Counts:
    """(OCTAVES) how many lengths are 1, 2 to 3, 4 to 7, ...; the last takes all beyond."""
    exponents = np.frexp(np.asarray(lengths, dtype=np.float64))[1] - 1
    return np.bincount(np.clip(exponents, 0, OCTAVES - 1), minlength=OCTAVES).astype(np.int64)


def scan_epochs(data: SampledData, progress: Progress | None = None) -> tuple[Counts, Counts]:
    """(E, S) rows and (E, S) tokens of every stratum in every epoch."""
    shape = (data.num_epochs, len(data.strata()))
    rows, tokens = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for epoch in range(data.num_epochs):
        index, ids = data.epoch(epoch), data.stratum_ids(epoch)
        if ids is None:
            raise DataError(
                f"{data.folder}: epoch {epoch} does not say which stratum a row is of; sample it "
                "with `hrm-text data prepare`"
            )
        for at in range(0, index.num_rows, ROWS_PER_CHUNK):
            part = index.take(slice(at, at + ROWS_PER_CHUNK))
            which = ids[at : at + ROWS_PER_CHUNK]
            lengths = part.inst_len + part.resp_len
            rows[epoch] += np.bincount(which, minlength=shape[1])
            # As floats, but exact: a piece's sum is far below 2^53.
            tokens[epoch] += np.bincount(which, lengths, minlength=shape[1]).astype(np.int64)
        if progress is not None:
            progress("reading epochs", epoch + 1, data.num_epochs)
    return rows, tokens


def try_packing(data: SampledData) -> list[dict[str, Any]]:
    """How full batches of some sizes are, by the rows that epoch 0 begins with."""
    index = data.epoch(0)
    lengths = index.take(slice(0, PACKED_ROWS)).input_lengths()
    context = max(data.max_seq_len, int(lengths.max()))
    tried = []
    for contexts, bins in BINS:
        plan = plan_epoch(lengths, contexts * context, contexts * context // bins)
        tried.append(
            {
                "batch_tokens": plan.batch_tokens,
                "bin_tokens": plan.bin_tokens,
                "batches": plan.num_batches,
                "rows": len(lengths),
                "filled": plan.utilization(lengths),
            }
        )
    return tried


def compare_mixture(
    config: DataConfig, sampled: dict[str, Any], rows: Counts, tokens: Counts
) -> list[dict[str, Any]]:
    """What an epoch was to hold of each source, and what every epoch holds.

    A source is the strata of one budget of tokens, or those whose names begin alike.
    """
    names = list(sampled["strata"])
    found: dict[tuple[str, bool], dict[str, Any]] = {}
    for group in group_strata(names, config.sampling):
        by_tokens = group.rule.by_tokens
        name = (group.name or "(all)") if by_tokens else source_of(group.name)
        source = found.setdefault(
            (name, by_tokens),
            {"source": name, "unit": "tokens" if by_tokens else "rows", "planned": 0, "strata": []},
        )
        if by_tokens:
            source["planned"] += config.sampling.budget(group.rule)
        for number in group.strata:
            source["strata"].append(number)
            if not by_tokens:
                usable = sampled["strata"][names[number]]["usable_rows"]
                most = usable if group.rule.max_rows is None else group.rule.max_rows
                source["planned"] += min(usable, most) * group.rule.repeat
    for source in found.values():
        which = source.pop("strata")
        counted = tokens if source["unit"] == "tokens" else rows
        covered = [sampled["strata"][names[number]].get("covered_tokens") for number in which]
        drawn = int(tokens[:, which].sum())
        source |= {
            "num_strata": len(which),
            "realised": counted[:, which].sum(axis=1).tolist(),
            "tokens": tokens[:, which].sum(axis=1).tolist(),
            "unique": None if None in covered else sum(covered) / max(1, drawn),
        }
    return sorted(found.values(), key=lambda source: (-sum(source["tokens"]), source["source"]))


def count_drops(stages: dict[str, Any]) -> list[tuple[str, str, int]]:
    """(stage, reason, rows) over all strata."""
    counts: dict[str, collections.Counter[str]] = {
        stage: collections.Counter()
        for stage in (
            "generating",
            "source's rule",
            "reading",
            "cleaning",
            "tokenising",
            "sampling",
        )
    }
    sources = stages["sources"]
    for family in sources.get("reasoning_gym", {}).get("families", {}).values():
        _add(counts["generating"], family["dropped"])
    for source in sources.get("hub", {}).values():
        _add(counts["source's rule"], source.get("left_out", {}))
        _add(counts["reading"], source.get("problems", {}))
    for stratum in stages["clean"]["strata"].values():
        _add(counts["reading"], stratum["unreadable"])
        _add(counts["cleaning"], stratum["dropped"])
    for dropped in stages["tokenized"]["dropped"].values():
        _add(counts["tokenising"], dropped)
    for stratum in stages["sampled"]["strata"].values():
        _add(counts["sampling"], stratum["dropped"])
    return [
        (stage, reason, rows)
        for stage, reasons in counts.items()
        for reason, rows in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    ]


def _add(counts: collections.Counter[str], dropped: dict[str, Any]) -> None:
    for reason, value in dropped.items():
        counts[reason] += value["rows"] if isinstance(value, dict) else value


def kinds_by_source(scan: Scan) -> dict[str, Counts]:
    """Source -> (2, K) tokens and bytes by kind of entry."""
    found: dict[str, Counts] = {}
    for stratum, kinds in zip(scan.strata, scan.kinds, strict=True):
        name = source_of(stratum)
        found[name] = found.get(name, np.zeros((2, len(KINDS)), np.int64)) + kinds
    return found
