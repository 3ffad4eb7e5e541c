"""The table of a comparison: means over seeds, differences from the reference, intervals."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hrmtext.ablate.plan import PlannedRun
from hrmtext.config.ablate import AblationConfig
from hrmtext.errors import CheckpointError
from hrmtext.evaluate.report import EVALUATION_FILE
from hrmtext.runtime.io import write_json, write_text
from hrmtext.train.metrics import read_metrics

TABLE_FILE, JSON_FILE = "table.md", "table.json"
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t with 1 to 9 degrees of freedom; beyond, the normal's 1.96."""

MOST_SEEDS = 5
"""Seeds that are shown one by one."""
MOST_COLUMNS = 12
"""Families that have columns of their own; more are shown by source."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One variant over its seeds; shares are 0 to 1."""

    variant: str
    architecture: str
    mask: str
    """`prefix` or `causal`."""
    loss_on: str
    """`response` or `all`: the tokens that bear loss."""
    parameters: int
    steps: int
    flops: float
    seeds: int
    exact_match: float
    """Mean over families, then seeds."""
    half_width: float | None
    """Of the 95 % interval of exact_match over seeds (Student's t); None with one seed."""
    exact_match_by_seed: list[float]
    difference: float
    """exact_match less the reference's, seed by seed, mean; 0 for the reference."""
    difference_half_width: float | None
    """Of its 95 % interval over seeds: seeds are paired, so it can be narrower than both rows'."""
    families: dict[str, float]
    """Mean exact match over seeds."""
    validation_loss: float
    """Of the averaged weights at the end, in nats a token, mean over seeds."""
    loss_half_width: float | None
    majority: float
    """Exact match of a constant answer, mean over families."""


def tabulate(runs: Sequence[PlannedRun]) -> list[Row]:
    """The table of finished runs, a row a variant, every variant with the same seeds.

    Rows of one architecture follow one another; the first is the reference.
    """
    by_variant: dict[str, list[PlannedRun]] = {}
    for run in runs:
        by_variant.setdefault(run.variant, []).append(run)
    table: list[Row] = []
    reference: list[float] = []
    for name, members in by_variant.items():
        members = sorted(members, key=lambda run: run.seed)
        found = [read_json(run.folder / EVALUATION_FILE) for run in members]
        scores = [float(report["mean"]["exact_match"]) for report in found]
        reference = reference or scores
        pairs = [ours - theirs for ours, theirs in zip(scores, reference, strict=True)]
        losses = [_last_loss(run) for run in members]
        families: dict[str, list[float]] = {}
        for report in found:
            for family in report["families"]:
                families.setdefault(family["name"], []).append(float(family["exact_match"]))
        recipe = members[0].recipe
        table.append(
            Row(
                variant=name,
                architecture=recipe.model.architecture or "hrm",
                mask="prefix" if recipe.model.prefix_lm else "causal",
                loss_on=recipe.objective,
                parameters=members[0].parameters,
                steps=int(recipe.max_steps or 0),
                flops=members[0].flops,
                seeds=len(members),
                exact_match=statistics.fmean(scores),
                half_width=half_width(scores),
                exact_match_by_seed=scores,
                difference=statistics.fmean(pairs),
                difference_half_width=half_width(pairs) if table else None,
                families={family: statistics.fmean(part) for family, part in families.items()},
                validation_loss=statistics.fmean(losses),
                loss_half_width=half_width(losses),
                majority=float(found[0]["mean"]["majority"]),
            )
        )
    order = list(dict.fromkeys(row.architecture for row in table))
    return sorted(table, key=lambda row: order.index(row.architecture))


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of the mean over independent runs; None for a single one.

    NaN where a value is not finite, as a diverged run's loss.
    """
    if len(values) < 2:
        return None
    if not all(map(math.isfinite, values)):
        return math.nan  # statistics.stdev fails on it
    degrees = len(values) - 1
    quantile = T_975[degrees - 1] if degrees <= len(T_975) else 1.96
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def write(config: AblationConfig, table: Sequence[Row], out: Path) -> None:
    """table.md for people, table.json for programs."""
    text = "\n".join([*_head(config, table), "", *_main(table), "", *_by_family(table)])
    write_text(out / TABLE_FILE, text + "\n")
    values = {
        "title": config.title,
        "match": config.match,
        "rows": list(map(dataclasses.asdict, table)),
    }
    write_json(out / JSON_FILE, values)


def _head(config: AblationConfig, table: Sequence[Row]) -> list[str]:
    costs = [row.flops for row in table]
    if config.match == "flops":
        cost = f"{costs[0]:.3g} FLOPs each"
    else:
        cost = f"equal steps, {min(costs):.3g} to {max(costs):.3g} FLOPs"
    return [
        f"# {config.title}",
        "",
        f"{table[0].seeds} seeds, {cost}. Exact match on held-out rows in %, mean over families, "
        f"with its 95 % interval over seeds; a constant answer reaches "
        f"{100 * table[0].majority:.1f}. Difference: from {config.variants[0].name}, seed by seed, "
        "with the interval of the pairs. Loss: validation, nats a response token.",
    ]


def _main(table: Sequence[Row]) -> list[str]:
    names = _labels(table)
    shows_seeds = 2 <= table[0].seeds <= MOST_SEEDS
    by_seed = ["by seed"] if shows_seeds else []
    head = [*names, "parameters", "steps", "exact match", *by_seed, "difference", "loss"]
    lines = []
    for row in table:
        is_reference = row.difference_half_width is None and row.difference == 0.0
        difference = _percent(row.difference, row.difference_half_width, sign="+")
        scores = " ".join(f"{100 * score:.0f}" for score in row.exact_match_by_seed)
        spread = "" if row.loss_half_width is None else f" ± {row.loss_half_width:.3f}"
        lines.append(
            [
                *(str(getattr(row, name)) for name in names),
                f"{row.parameters:,}",
                f"{row.steps:,}",
                _percent(row.exact_match, row.half_width),
                *([scores] if shows_seeds else []),
                "" if is_reference else difference,
                f"{row.validation_loss:.3f}{spread}",
            ]
        )
    heads = [name.replace("_", " ") for name in head]
    return _markdown(heads, lines, num_texts=len(names))


def _by_family(table: Sequence[Row]) -> list[str]:
    names = _labels(table)
    columns = _columns(list(table[0].families))
    lines = [
        [
            *(str(getattr(row, name)) for name in names),
            *(
                f"{100 * statistics.fmean(row.families[family] for family in members):.1f}"
                for members in columns.values()
            ),
        ]
        for row in table
    ]
    heads = [*(name.replace("_", " ") for name in names), *columns]
    return _markdown(heads, lines, num_texts=len(names))


def _columns(families: list[str]) -> dict[str, list[str]]:
    """Heads of columns and the families whose mean they show: one each, or those of a source."""
    if len(families) <= MOST_COLUMNS:
        return {family: [family] for family in families}
    columns: dict[str, list[str]] = {}
    for family in families:
        columns.setdefault(family.partition("__")[0], []).append(family)
    return {
        source if len(members) == 1 else f"{source} ({len(members)} families)": members
        for source, members in columns.items()
    }


def _labels(table: Sequence[Row]) -> list[str]:
    """What tells the rows apart: the settings that vary, or the names where these do not do."""
    names = [
        name
        for name in ("architecture", "mask", "loss_on")
        if len({getattr(row, name) for row in table}) > 1
    ]
    settings = {tuple(getattr(row, name) for name in names) for row in table}
    return names if len(settings) == len(table) else ["variant", *names]


def _markdown(heads: list[str], lines: list[list[str]], num_texts: int) -> list[str]:
    marks = [" --- |"] * num_texts + [" ---: |"] * (len(heads) - num_texts)
    rows = ["| " + " | ".join(cells) + " |" for cells in lines]
    return ["| " + " | ".join(heads) + " |", "|" + "".join(marks), *rows]


def _percent(value: float, half: float | None, sign: str = "") -> str:
    spread = "" if half is None else f" ± {100 * half:.1f}"
    return f"{100 * value:{sign}.1f}{spread}"


def _last_loss(run: PlannedRun) -> float:
    losses = [
        record["ema"]["loss"]
        for record in read_metrics(run.folder / "metrics.jsonl")
        if record.get("kind") == "validation"
    ]
    return float(losses[-1]) if losses else math.nan


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a run; CheckpointError where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
