"""What an evaluation found: as data, as evaluation.json, as a table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hrmtext.runtime.io import atomic_file, write_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

EVALUATION_FILE = "evaluation.json"
PREDICTIONS_FILE = "predictions.jsonl"
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """One held-out row and its answer."""

    family: str
    condition: str
    instruction: str
    expected: str
    answer: str
    right: bool
    valid: bool
    """The answer ended by itself."""
    score: float | None
    """The family's own mark, where its scorer is there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FamilyResult:
    """Scores of one family; shares are 0 to 1."""

    name: str
    rows: int
    exact_match: float
    low: float
    """Lower end of the 95 % interval of exact_match (Wilson)."""
    high: float
    majority: float
    """Exact match of always giving `majority_answer`."""
    majority_answer: str
    invalid: float
    """Share of answers without an end before the limit."""
    too_long: int
    """Rows whose prompt leaves no room for an answer; they count as wrong and invalid."""
    score: float | None
    """Mean of the family's own scorer over the rows that it can judge; None: over no row."""
    scored_rows: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """All families, and how they were evaluated."""

    families: list[FamilyResult]
    mean: dict[str, float | None]
    """Unweighted means over families: exact_match, majority, invalid, score."""
    majority_source: str
    """Where the majority answers come from: `training rows` or `held-out rows`."""
    settings: dict[str, Any]
    generated_tokens: int
    elapsed_s: float
    predictions: list[Prediction]

    def to_mapping(self) -> dict[str, Any]:
        """The content of evaluation.json: everything but the single predictions."""
        values = dataclasses.asdict(self)
        del values["predictions"]
        return {"format_version": FORMAT_VERSION, **values}

    def write(self, folder: str | Path, *, predictions: bool = False) -> Path:
        """Write evaluation.json into `folder` (and predictions.jsonl); returns its path."""
        folder = Path(folder)
        if predictions:
            with (
                atomic_file(folder / PREDICTIONS_FILE) as temporary,
                temporary.open("w", encoding="utf-8") as stream,
            ):
                for prediction in self.predictions:
                    fields = dataclasses.asdict(prediction)
                    stream.write(json.dumps(fields, ensure_ascii=False) + "\n")
        write_json(folder / EVALUATION_FILE, self.to_mapping())
        return folder / EVALUATION_FILE

    def table(self) -> Table:
        """A rich table of 80 columns: one line a family, the means below, shares in percent."""
        from rich import box
        from rich.table import Table

        with_scores = any(family.score is not None for family in self.families)
        table = Table(
            title="Held-out exact match, in %",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
        )
        table.add_column("family", overflow="fold")
        for head in ("exact", "95 % range", "majority", "invalid"):
            table.add_column(head, justify="right", no_wrap=True)
        if with_scores:
            table.add_column("scorer", justify="right", no_wrap=True)
        table.add_column("rows", justify="right", no_wrap=True)
        for family in self.families:
            cells = [
                family.name,
                _percent(family.exact_match),
                f"{100 * family.low:.1f}-{100 * family.high:.1f}",
                _percent(family.majority),
                _percent(family.invalid),
            ]
            cells += [_percent(family.score)] if with_scores else []
            table.add_row(*cells, f"{family.rows:,}")
        table.add_section()
        cells = [
            "mean of families",
            _percent(self.mean["exact_match"]),
            "",
            _percent(self.mean["majority"]),
            _percent(self.mean["invalid"]),
        ]
        cells += [_percent(self.mean["score"])] if with_scores else []
        total = sum(family.rows for family in self.families)
        table.add_row(*cells, f"{total:,}", style="bold")
        return table

    def show(self, console: Console | None = None) -> None:
        """Print the table, and how it was made."""
        from rich.console import Console

        console = console or Console()
        console.print(self.table())
        rate = self.generated_tokens / max(self.elapsed_s, 1e-9)
        console.print(
            f"exact: {self.settings['normalisation']}\n"
            f"majority: always the most frequent answer of the family's {self.majority_source}\n"
            f"{self.generated_tokens:,} tokens in {self.elapsed_s:.1f} s, {rate:,.0f} a second",
            highlight=False,
        )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"
