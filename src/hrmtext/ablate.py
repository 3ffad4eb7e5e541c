"""Comparisons like the paper's tables: variants at equal cost, several seeds, intervals."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from hrmtext.artifacts.layout import RunFolder
from hrmtext.config.ablate import AblationConfig, Variant
from hrmtext.config.train import TrainConfig
from hrmtext.data.heldout import read_held_out
from hrmtext.errors import CheckpointError, DataError
from hrmtext.evaluate.report import EVALUATION_FILE
from hrmtext.evaluate.run import evaluate
from hrmtext.evaluate.score import majority_answers
from hrmtext.generate.load import load
from hrmtext.runtime.io import write_json, write_text
from hrmtext.train.estimate import estimate
from hrmtext.train.loop import train
from hrmtext.train.metrics import read_metrics

TABLE_FILE, JSON_FILE = "table.md", "table.json"
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t with 1 to 9 degrees of freedom; beyond, the normal's 1.96."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One training run of the comparison."""

    variant: str
    seed: int
    recipe: TrainConfig
    folder: Path
    flops: float
    """Operations of the whole run, by counting."""
    parameters: int
    """Stored ones."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One variant over its seeds; shares are 0 to 1."""

    variant: str
    parameters: int
    steps: int
    flops: float
    seeds: int
    exact_match: float
    """Mean over families, then seeds."""
    half_width: float | None
    """Of the 95 % interval of exact_match over seeds (Student's t); None with one seed."""
    families: dict[str, float]
    """Mean exact match over seeds."""
    validation_loss: float
    """Of the averaged weights at the end, in nats a token, mean over seeds."""
    majority: float
    """Exact match of a constant answer, mean over families."""


def plan(config: AblationConfig, out: str | Path) -> list[PlannedRun]:
    """All runs, seed by seed, so that a comparison cut short holds every variant.

    The reference (the first variant) does `train.max_steps`; with `match: flops` the others do as
    many steps as its operations pay for.
    """
    costs: dict[str, tuple[int, float, int]] = {}
    reference = None
    for variant in config.variants:
        steps = int(config.train["max_steps"])
        flops, parameters = _cost(config, variant, steps)
        if reference is not None and config.match == "flops":
            steps = max(1, round(steps * reference / flops))
            flops, parameters = _cost(config, variant, steps)
        reference = flops if reference is None else reference
        costs[variant.name] = (steps, flops, parameters)
    return [
        PlannedRun(
            variant=variant.name,
            seed=seed,
            recipe=config.recipe(variant, seed, costs[variant.name][0]),
            folder=Path(out) / "runs" / f"{variant.name}-seed{seed}",
            flops=costs[variant.name][1],
            parameters=costs[variant.name][2],
        )
        for seed in config.seeds
        for variant in config.variants
    ]


def ablate(
    config: AblationConfig,
    data_folder: str | Path,
    out: str | Path,
    *,
    device: str | None = None,
    progress: str = "auto",
    tell: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Train and evaluate every run that is not done yet; write table.md and table.json.

    The same call goes on where an interrupted one stopped. The table is written anew after every
    round of seeds.

    Args:
        data_folder: what `hrm-text data prepare` made; its held-out rows are the test.
        out: folder of the runs and the table.
        tell: called with a line before every run.

    Raises:
        CheckpointError: `out` holds runs of another comparison. DataError: no held-out rows.
    """
    data_folder, out = Path(data_folder), Path(out)
    rows = read_held_out(data_folder / "heldout")
    if not rows:
        raise DataError(f"{data_folder} has no held-out rows to compare the variants on")
    majority = majority_answers(data_folder / "clean")
    runs = plan(config, out)
    table: list[Row] = []
    for number, run in enumerate(runs, start=1):
        done = (run.folder / EVALUATION_FILE).is_file()
        tell(
            f"run {number} of {len(runs)}: {run.variant}, seed {run.seed}, "
            f"{run.recipe.max_steps:,} steps" + (", done already" if done else "")
        )
        if not done:
            result = train(
                run.recipe,
                data_folder=data_folder,
                run_folder=run.folder,
                device=device,
                progress=progress,
            )
            model = load(result.checkpoint, device=device, dtype="fp32")
            report = evaluate(model, rows, config.evaluate, train_majority=majority)
            report.write(run.folder)
        _require_same_recipe(run)
        if number % len(config.variants) == 0:
            table = tabulate(runs[:number])
            write(config, table, out)
    return table


def tabulate(runs: Sequence[PlannedRun]) -> list[Row]:
    """The table of finished runs, a row a variant in the order of their first run."""
    by_variant: dict[str, list[PlannedRun]] = {}
    for run in runs:
        by_variant.setdefault(run.variant, []).append(run)
    table = []
    for name, members in by_variant.items():
        found = [_read(run.folder / EVALUATION_FILE) for run in members]
        scores = [float(report["mean"]["exact_match"]) for report in found]
        families: dict[str, list[float]] = {}
        for report in found:
            for family in report["families"]:
                families.setdefault(family["name"], []).append(float(family["exact_match"]))
        table.append(
            Row(
                variant=name,
                parameters=members[0].parameters,
                steps=int(members[0].recipe.max_steps or 0),
                flops=members[0].flops,
                seeds=len(members),
                exact_match=statistics.fmean(scores),
                half_width=half_width(scores),
                families={family: statistics.fmean(part) for family, part in families.items()},
                validation_loss=statistics.fmean(_last_loss(run) for run in members),
                majority=float(found[0]["mean"]["majority"]),
            )
        )
    return table


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of the mean over independent runs; None for a single one."""
    if len(values) < 2:
        return None
    degrees = len(values) - 1
    quantile = T_975[degrees - 1] if degrees <= len(T_975) else 1.96
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def write(config: AblationConfig, table: Sequence[Row], out: Path) -> None:
    """table.md for people, table.json for programs."""
    families = list(table[0].families)
    head = ["variant", "parameters", "steps", "FLOPs", "exact match, %", *families, "loss"]
    lines = [
        f"# {config.title}",
        "",
        f"{table[0].seeds} seeds, equal {'operations' if config.match == 'flops' else 'steps'}; "
        "exact match on held-out rows, mean over families, with its 95 % interval over seeds; "
        f"a constant answer reaches {100 * table[0].majority:.1f} %. Loss: validation, nats a "
        "response token.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + " --- |" + " ---: |" * (len(head) - 1),
    ]
    for row in table:
        spread = "" if row.half_width is None else f" ± {100 * row.half_width:.1f}"
        cells = [
            row.variant,
            f"{row.parameters:,}",
            f"{row.steps:,}",
            f"{row.flops:.3g}",
            f"{100 * row.exact_match:.1f}{spread}",
            *(f"{100 * row.families[family]:.1f}" for family in families),
            f"{row.validation_loss:.4f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    write_text(out / TABLE_FILE, "\n".join(lines) + "\n")
    values = {
        "title": config.title,
        "match": config.match,
        "rows": list(map(dataclasses.asdict, table)),
    }
    write_json(out / JSON_FILE, values)


def _cost(config: AblationConfig, variant: Variant, steps: int) -> tuple[float, int]:
    recipe = config.recipe(variant, config.seeds[0], steps)
    found = estimate(recipe, device=torch.device("cpu"))
    assert found.total_flops is not None, "max_steps is set"
    return found.total_flops, found.stored_parameters


def _require_same_recipe(run: PlannedRun) -> None:
    """A finished run may be left from another comparison in the same folder."""
    checkpoint = RunFolder(run.folder).latest()
    found = _read(checkpoint / "training.json")
    steps, seed = found.get("total_steps"), found.get("config", {}).get("seed")
    if (steps, seed) != (run.recipe.max_steps, run.seed):
        raise CheckpointError(
            f"{run.folder} is a run of {steps} steps with seed {seed}, this comparison plans "
            f"{run.recipe.max_steps} with seed {run.seed}; name another output folder"
        )


def _last_loss(run: PlannedRun) -> float:
    losses = [
        record["ema"]["loss"]
        for record in read_metrics(run.folder / "metrics.jsonl")
        if record.get("kind") == "validation"
    ]
    return float(losses[-1]) if losses else math.nan


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
