"""report.html of a prepared folder: what is in it, what was left out and why, with plots."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from hrmtext.config.base import dump_yaml
from hrmtext.data.report.audit import audit_section
from hrmtext.data.report.collect import OCTAVES, PreparedReport, collect, kinds_by_source
from hrmtext.data.report.manifest import MANIFEST_FILE, sources
from hrmtext.data.report.vocabulary import KINDS
from hrmtext.data.sources.local import stratum_label
from hrmtext.data.workers import Progress
from hrmtext.runtime.chart import bars, shares
from hrmtext.runtime.io import write_text
from hrmtext.runtime.page import facts_boxes, page, table

PAGE_FILE = "report.html"
MAX_STRATA = 200
"""Rows of the table of strata, the largest first."""
SAMPLES_SHOWN = 3


def write_report(folder: str | Path, progress: Progress | None = None) -> Path:
    """Write `report.html` into a prepared folder; the same folder gives the same bytes.

    Raises:
        DataError: not a prepared folder, or a damaged one.
    """
    report = collect(folder, progress)
    name = report.folder.resolve().name
    parts = [
        f"<h1>{html.escape(name)}</h1>",
        f"<p class=dim>data {html.escape(report.fingerprint)} · files, checksums and licences: "
        f"{MANIFEST_FILE}</p>",
        _facts(report),
        _plots(report),
        _mixture(report),
        _drops(report),
        _strata(report),
        _conditions(report),
        _packing(report),
        _tokenizer(report),
        *(audit_section(audit) for audit in report.audits.values()),
        "" if report.audits else _no_audit(),
        _sources(report),
        f"<h2>Configuration</h2><pre>{html.escape(dump_yaml(report.config))}</pre>",
    ]
    path = report.folder / PAGE_FILE
    write_text(path, page(f"{name} · hrm-text data", parts))
    return path


def _facts(report: PreparedReport) -> str:
    scan, sampled = report.scan, report.stages["sampled"]
    drawn = int(report.epoch_tokens.sum())
    facts = [
        ("rows, clean", f"{sum(scan.rows):,}"),
        ("tokens, clean", f"{sum(scan.prompt_tokens) + sum(scan.response_tokens):,}"),
        ("strata", f"{len(scan.strata):,}"),
        ("rows left out", f"{sum(rows for _, _, rows in report.drops):,}"),
        ("rows held out", f"{sum(report.stages['sources']['held_out_rows'].values()):,}"),
        ("epochs", f"{sampled['epochs']}"),
        ("rows an epoch", f"{sampled['rows_per_epoch']:,}"),
        ("tokens an epoch", f"{sampled['tokens_per_epoch']:,}"),
        ("response tokens, clean", _share(sum(scan.response_tokens), _tokens(report))),
        ("unique tokens of all epochs", _unique(report.unique_tokens, drawn)),
        ("batches filled", f"{100 * report.packing[-1]['filled']:.2f} %"),
        ("vocabulary", f"{report.stages['tokenizer']['vocab_size']:,}"),
    ]
    return facts_boxes(facts)


def _plots(report: PreparedReport) -> str:
    scan = report.scan
    used = np.flatnonzero(scan.prompt_lengths + scan.response_lengths)
    first, last = int(used[0]), int(used[-1]) + 1
    edges = [float(2**place) for place in range(first, last + 1)]
    assert last <= OCTAVES, "a histogram has no more bars"
    lengths = bars(
        "Lengths", "rows", edges,
        [
            ("instruction", scan.prompt_lengths[first:last].tolist()),
            ("response", scan.response_lengths[first:last].tolist()),
        ],
        "tokens",
    )  # fmt: skip
    total = max(1, int(report.epoch_tokens.sum()))
    mixture = shares(
        "Mixture, by tokens of all epochs",
        [(source["source"], sum(source["tokens"]) / total) for source in report.mixture],
    )
    dropped = shares(
        "Rows left out, of all rows",
        [
            (f"{reason} ({stage})", rows / max(1, rows_seen(report)))
            for stage, reason, rows in report.drops
        ],
    )
    kept = sum(scan.conditions.values())
    conditions = shares(
        "Conditions, by rows",
        [
            (name or "(none)", rows / max(1, kept))
            for name, rows in sorted(scan.conditions.items(), key=lambda item: (-item[1], item[0]))
        ],
    )
    return f"<h2>Plots</h2><div class=charts>{lengths}{mixture}{dropped}{conditions}</div>"


def rows_seen(report: PreparedReport) -> int:
    """Rows of all sources: those kept in clean/ and those dropped before."""
    before = sum(rows for stage, _, rows in report.drops if stage not in ("sampling", "tokenising"))
    return report.stages["clean"]["kept"] + before


def _mixture(report: PreparedReport) -> str:
    total = max(1, int(report.epoch_tokens.sum()))
    rows = []
    for source in report.mixture:
        planned, realised = source["planned"], source["realised"]
        off = max((abs(value - planned) / planned for value in realised), default=0.0)
        rows.append(
            [
                source["source"], f"{source['num_strata']:,}",
                f"{planned:,} {source['unit']}",
                ", ".join(f"{value:,}" for value in realised),
                f"{100 * off:.3f} %",
                ", ".join(f"{value:,}" for value in source["tokens"]),
                f"{100 * sum(source['tokens']) / total:.2f} %",
                "not recorded" if source["unique"] is None else f"{100 * source['unique']:.1f} %",
            ]
        )  # fmt: skip
    heads = [
        "source", "strata", "planned an epoch", "each epoch has", "furthest off", "tokens",
        "share of tokens", "unique tokens",
    ]  # fmt: skip
    note = (
        "<p class=dim>Planned: a budget of tokens where the mixture states one, else rows (caps "
        "and repeats). Unique: share of the tokens of all epochs that are seen for the first "
        "time.</p>"
    )
    return f"<h2>Mixture</h2>{note}{table(heads, rows)}"


def _drops(report: PreparedReport) -> str:
    seen = max(1, rows_seen(report))
    rows = [
        [reason, stage, f"{count:,}", f"{100 * count / seen:.3f} %"]
        for stage, reason, count in report.drops
    ]
    parts = ["<h2>Rows left out</h2>"]
    parts.append(
        table(["reason", "stage", "rows", "of all rows"], rows) if rows else "<p>None.</p>"
    )
    strata = report.stages["clean"]["strata"]
    changed: dict[str, int] = {}
    samples: dict[str, list[tuple[str, dict[str, str]]]] = {}
    for name, stratum in strata.items():
        for what, count in stratum.get("changed", {}).items():
            changed[what] = changed.get(what, 0) + count
        for reason, kept in stratum["samples"].items():
            held = samples.setdefault(reason, [])
            held += [(name, row) for row in kept][: SAMPLES_SHOWN - len(held)]
    if changed:
        lines = [[what, f"{count:,}"] for what, count in sorted(changed.items())]
        parts.append(f"<h2>Rows changed</h2>{table(['what was done', 'rows'], lines)}")
    for reason, kept in sorted(samples.items()):
        columns = list(dict.fromkeys(column for _, row in kept for column in row))
        lines = [[name, *(str(row.get(column, "")) for column in columns)] for name, row in kept]
        heads = ["stratum", *columns]
        parts.append(
            f"<details><summary>Samples: {html.escape(reason)}</summary>{_texts(heads, lines)}"
            "</details>"
        )
    places = [
        [reason, ", ".join(problem["first"])]
        for stratum in strata.values()
        for reason, problem in stratum["unreadable"].items()
    ][:MAX_STRATA]
    if places:
        parts.append(
            "<details><summary>Places of unreadable rows</summary>"
            f"{_texts(['reason', 'first places'], places)}</details>"
        )
    return "".join(parts)


def _strata(report: PreparedReport) -> str:
    scan, clean = report.scan, report.stages["clean"]["strata"]
    sampled = {stratum_label(n): s for n, s in report.stages["sampled"]["strata"].items()}
    held_out = report.stages["sources"]["held_out_rows"]
    total = max(1, _tokens(report))
    lines = []
    for name, rows, prompts, responses in zip(
        scan.strata, scan.rows, scan.prompt_tokens, scan.response_tokens, strict=True
    ):
        drops = clean.get(name, {}).get("dropped", {}), sampled.get(name, {}).get("dropped", {})
        line = [
            name, f"{rows:,}", f"{prompts:,}", f"{responses:,}",
            f"{100 * (prompts + responses) / total:.2f} %",
            f"{sum(sum(drop.values()) for drop in drops):,}",
            f"{held_out.get(name, 0):,}", f"{sampled.get(name, {}).get('rows_per_epoch', 0):,}",
            f"{round(sampled.get(name, {}).get('tokens_per_epoch', 0)):,}",
        ]  # fmt: skip
        lines.append((-prompts - responses, name, line))
    lines.sort()
    heads = [
        "stratum", "rows", "instruction tokens", "response tokens", "share", "left out",
        "held out", "rows an epoch", "tokens an epoch",
    ]  # fmt: skip
    more = f"<p class=dim>and {len(lines) - MAX_STRATA:,} more, smaller ones</p>"
    body = table(heads, [line for _, _, line in lines[:MAX_STRATA]])
    return f"<h2>Strata</h2>{body}{more if len(lines) > MAX_STRATA else ''}"


def _conditions(report: PreparedReport) -> str:
    total = max(1, sum(report.scan.conditions.values()))
    rows = [
        [name or "(none)", f"{count:,}", f"{100 * count / total:.2f} %"]
        for name, count in sorted(
            report.scan.conditions.items(), key=lambda item: (-item[1], item[0])
        )
    ]
    return f"<h2>Conditions</h2>{table(['condition', 'rows', 'share'], rows)}"


def _packing(report: PreparedReport) -> str:
    rows = [
        [
            f"{tried['batch_tokens']:,}", f"{tried['bin_tokens']:,}", f"{tried['batches']:,}",
            f"{100 * tried['filled']:.2f} %",
        ]
        for tried in report.packing
    ]  # fmt: skip
    note = (
        f"<p class=dim>Tried on the first {report.packing[0]['rows']:,} rows of epoch 0, which are "
        "shuffled; the last batch, part-filled, counts.</p>"
    )
    heads = ["tokens of a batch", "tokens of a bin", "batches", "filled"]
    return f"<h2>Packing</h2>{note}{table(heads, rows)}"


def _tokenizer(report: PreparedReport) -> str:
    by_source = kinds_by_source(report.scan)
    total = np.sum(list(by_source.values()), axis=0)
    plain = [place for place, kind in enumerate(KINDS) if kind != "special"]
    shown = [place for place in plain if total[0, place]]
    lines = []
    ranked = sorted(by_source.items(), key=lambda item: (-int(item[1][0].sum()), item[0]))
    for name, kinds in [("all", total), *ranked[:MAX_STRATA]]:
        text = kinds[:, [place for place, kind in enumerate(KINDS) if kind != "special"]].sum(
            axis=1
        )
        cells = [_ratio(text[1], text[0])]
        cells += [_ratio(kinds[1, place], kinds[0, place]) for place in shown]
        lines.append([name, f"{text[0]:,}", *cells])
    heads = ["bytes a token", "tokens of text", "all", *(KINDS[place] for place in shown)]
    uses = [
        [KINDS[place], f"{total[0, place]:,}", _share(total[0, place], int(total[0].sum()))]
        for place in range(len(KINDS))
        if total[0, place]
    ]
    found = report.scan.vocabulary
    unused = ", ".join(repr(text) for text in found["first_unused"]) or "none"
    most = ", ".join(f"{text!r} {count:,}" for text, count in found["most_used"])
    return (
        f"<h2>Tokenizer</h2>{table(heads, lines)}"
        f"{table(['kind of entry', 'tokens', 'share'], uses)}"
        f"<p>{found['unused']:,} of {found['entries']:,} entries are never used in the clean rows "
        f"({found['unused_bytes']:,} of them single bytes), {found['used_once']:,} once; "
        f"{found['special']:,} special tokens not counted.</p>"
        f"<p class=dim>Unused, lowest ids first: {html.escape(unused)}</p>"
        f"<p class=dim>Most used: {html.escape(most)}</p>"
    )


def _sources(report: PreparedReport) -> str:
    lines = [
        [
            str(source.get("source") or source.get("path") or source.get("package")),
            source["kind"], source["licence"],
        ]
        for source in sources(report.config)
    ]  # fmt: skip
    return f"<h2>Sources and licences</h2>{table(['source', 'kind', 'licence'], lines)}"


def _no_audit() -> str:
    return (
        "<h2>Contamination</h2><p>Not audited: <code>hrm-text data contamination</code> searches "
        "the rows for a benchmark's questions.</p>"
    )


def _texts(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of longer texts, all to the left."""
    return f"<div class=texts>{table(heads, rows)}</div>"


def _tokens(report: PreparedReport) -> int:
    return sum(report.scan.prompt_tokens) + sum(report.scan.response_tokens)


def _unique(unique: int | None, drawn: int) -> str:
    return "not recorded" if unique is None else _share(unique, drawn)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / max(1, whole):.1f} %"


def _ratio(num_bytes: int, tokens: int) -> str:
    return f"{num_bytes / tokens:.3f}" if tokens else ""
