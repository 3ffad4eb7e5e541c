"""A contamination audit as HTML: a section of the data report, and a page of its own."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hrmtext.runtime.io import write_json, write_text
from hrmtext.runtime.page import page, table

AUDITS_FOLDER = "contamination"
VERDICTS = {True: "significant", False: "not significant", None: "cannot be judged"}


def write_audit(audit: Mapping[str, Any], folder: str | Path, name: str) -> Path:
    """Write `contamination/<name>.json` and `.html` into a data folder; the path of the first."""
    path = Path(folder) / AUDITS_FOLDER / f"{name}.json"
    write_json(path, audit)
    title = f"contamination, {name} · hrm-text data"
    write_text(path.with_suffix(".html"), page(title, [audit_section(audit)]))
    return path


def audit_section(audit: Mapping[str, Any]) -> str:
    """Subsets, Z and the most contaminated questions of every benchmark of an audit."""
    corpus = audit["corpus"]
    parts = [
        "<h2>Contamination</h2>"
        f"<p class=dim>{corpus['rows']:,} rows, {corpus['tokens']:,} tokens searched. A question's "
        "contamination is the share of its tokens inside a run of n tokens that a training row "
        "holds too. Z compares a subset's mean score with that of all questions, for subsets drawn "
        "without replacement; in brackets without that correction. Only |Z| &gt; 2 in all four "
        "subsets counts as significant.</p>"
    ]
    for name, benchmark in audit["benchmarks"].items():
        for size, found in benchmark["ngrams"].items():
            parts.append(f"<h3>{html.escape(name)}, n = {html.escape(size)}</h3>")
            verdict = f"; {VERDICTS[found['significant']]}" if benchmark["scored"] else ""
            parts.append(
                f"<p>{found['questions_matched']:,} of {benchmark['questions']:,} questions "
                f"overlap, {100 * found['mean_contamination']:.2f} % of a question on average; "
                f"{found['questions_shorter']:,} are shorter than n{verdict}.</p>"
            )
            rows = [
                [
                    subset, f"{values['questions']:,}", _number(values.get("mean_score")),
                    f"{_number(values.get('z'))} ({_number(values.get('z_uncorrected'))})",
                ]
                for subset, values in found["subsets"].items()
            ]  # fmt: skip
            width = 4 if benchmark["scored"] else 2
            heads = ["subset", "questions", "mean score", "Z"]
            parts.append(table(heads[:width], [row[:width] for row in rows]))
            listed = [
                [
                    f"{question['question']}", f"{100 * question['contamination']:.0f} %",
                    f"{question['stratum']}, row {question['row']}", question["text"],
                ]
                for question in found["most_contaminated"]
            ]  # fmt: skip
            if listed:
                heads = ["question", "contamination", "first seen in", "text"]
                parts.append(
                    "<details><summary>Most contaminated questions</summary><div class=texts>"
                    f"{table(heads, listed)}</div></details>"
                )
    return "".join(parts)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
