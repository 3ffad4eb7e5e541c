"""report.html: what a run was and how it went, in one file that needs no server and no network."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from hrmtext.artifacts.layout import RunFolder
from hrmtext.errors import CheckpointError
from hrmtext.runtime.chart import Series, chart, smooth
from hrmtext.runtime.io import write_text
from hrmtext.runtime.page import facts_boxes, page, table
from hrmtext.train.metrics import read_metrics
from hrmtext.train.progress import format_time
from hrmtext.train.report_watch import (
    forgetting_section,
    inside_section,
    stability_marks,
    stability_section,
)


def write_report(run: RunFolder | str | Path) -> Path:
    """Write report.html from metrics.jsonl, config.yaml, versions.json and evaluation.json.

    Returns:
        The file's path. May be called again at any time, for example after an evaluation.

    Raises:
        CheckpointError: not a run folder.
    """
    if not isinstance(run, RunFolder):
        run = RunFolder(run)
    if not run.exists:
        raise CheckpointError(f"{run.path} is not a run folder (no {run.config_file.name})")
    records = read_metrics(run.metrics_file)
    training = [record for record in records if record["kind"] == "train"]
    validations = [record for record in records if record["kind"] == "validation"]
    stability = [record for record in records if record["kind"] == "stability"]
    telemetry = [record for record in records if record["kind"] == "telemetry"]
    versions = _json(run.versions_file)
    # A folder that is called `run`, as the README's, says nothing; the one above it does.
    folder = run.path.resolve()
    name = f"{folder.parent.name}/{folder.name}" if folder.name == "run" else folder.name
    parts = [
        f"<h1>{html.escape(name)}</h1>",
        f"<p class=dim>{html.escape(_where(versions))}</p>",
        _facts(training, validations) + _checkpoints(run),
        _charts(training, validations, stability),
        stability_section(stability),
        inside_section(telemetry),
        _strata(validations),
        forgetting_section([record for record in records if record["kind"] == "forgetting"]),
        _evaluation(_json(run.evaluation_file)),
        f"<h2>Configuration</h2><pre>{html.escape(run.config_file.read_text('utf-8'))}</pre>",
        f"<h2>Versions</h2><pre>{html.escape(json.dumps(versions, indent=2))}</pre>",
    ]
    write_text(run.report_file, page(f"{name} · hrm-text", parts))
    return run.report_file


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _where(versions: dict[str, Any]) -> str:
    device = versions.get("device", {})
    packages = versions.get("versions", {})
    commit = versions.get("commit")
    facts = [
        str(device.get("device_name", "")),
        f"torch {packages.get('torch', '?')}",
        f"hrm-text {packages.get('hrm-text', '?')}",
        f"commit {commit[:10]}" if commit else "",
        f"data {versions.get('data_fingerprint', '?')}",
    ]
    return " · ".join(fact for fact in facts if fact)


def _facts(training: list[dict[str, Any]], validations: list[dict[str, Any]]) -> str:
    facts: list[tuple[str, str]] = []
    if training:
        last = training[-1]
        facts += [
            ("steps", f"{last['step']:,}"),
            ("tokens", f"{last['tokens']:,}"),
            ("training time", format_time(last["timing"]["elapsed_s"])),
            ("tokens a second", f"{_median([r['timing']['tokens_per_s'] for r in training]):,.0f}"),
            ("training loss", f"{last['loss']:.4f}"),
        ]
    if validations:
        last = validations[-1]
        for name, key in (("EMA", "ema"), ("raw", "raw")):
            value = last[key]
            facts.append((f"validation loss, {name}", f"{value['loss']:.4f}"))
            facts.append((f"answers right, {name}", f"{100 * value['exact_answer']:.1f} %"))
    return facts_boxes(facts) if facts else "<p>No steps yet.</p>"


def _checkpoints(run: RunFolder) -> str:
    """Which checkpoints there are, and which of them are the last and the best."""
    losses = run.losses()
    there = run.checkpoints()
    if not there:
        return ""
    best = run.best() if losses else None
    rows = []
    for path in there:
        names = [name for name, other in (("last", there[-1]), ("best", best)) if path == other]
        step = f"step {run.step_of(path):,}"
        loss = f"{losses[path]:.4f}" if path in losses else "not validated"
        rows.append([", ".join([*names, step]), loss])
    return f"<h2>Checkpoints</h2>{table(['checkpoint', 'validation loss, EMA'], rows)}"


def _charts(
    training: list[dict[str, Any]],
    validations: list[dict[str, Any]],
    stability: list[dict[str, Any]],
) -> str:
    steps = [record["step"] for record in training]

    def curve(key: str, factor: float = 1.0) -> list[float]:
        return [record[key] * factor for record in training]

    def timing(key: str, factor: float = 1.0) -> list[float]:
        return [record["timing"][key] * factor for record in training]

    at = [record["step"] for record in validations]

    def scored(weights: str, key: str, factor: float = 1.0) -> list[float]:
        return [record[weights][key] * factor for record in validations]

    losses = curve("loss")
    measured = [record for record in training if "peak_memory_bytes" in record["timing"]]
    num_cycles = len(validations[-1]["ema"]["loss_by_cycle"]) if validations else 0
    cycles = [
        Series(f"cycle {c + 1}", at, [v["ema"]["loss_by_cycle"][c] for v in validations], dots=True)
        for c in range(num_cycles)
    ]
    plots = [
        chart("Loss", "nats a token", [
            Series("training", steps, losses, faint=True),
            Series("training, smoothed", steps, smooth(losses)),
            Series("validation, raw", at, scored("raw", "loss"), dots=True),
            Series("validation, EMA", at, scored("ema", "loss"), dots=True),
        ], marks=stability_marks(stability), marks_name="stability guard"),
        chart("Token accuracy", "%", [
            Series("training", steps, smooth(curve("token_accuracy", 100))),
            Series("validation, raw", at, scored("raw", "token_accuracy", 100), dots=True),
            Series("validation, EMA", at, scored("ema", "token_accuracy", 100), dots=True),
        ]),
        chart("Whole answers right (teacher forcing)", "%", [
            Series("training", steps, smooth(curve("exact_answer", 100))),
            Series("validation, raw", at, scored("raw", "exact_answer", 100), dots=True),
            Series("validation, EMA", at, scored("ema", "exact_answer", 100), dots=True),
        ]),
        chart("Validation loss after each H cycle (EMA)", "nats a token", cycles),
        chart("Learning rate", "", [Series("learning rate", steps, curve("lr"))]),
        chart("Backward depth", "stack calls", [Series("with gradient", steps, curve("bp_steps"))]),
        chart("Throughput", "tokens/s", [Series("tokens/s", steps, timing("tokens_per_s"))]),
        chart("Compute", "GFLOP/s", [Series("GFLOP/s", steps, timing("flops_per_s", 1e-9))]),
        chart("Gradient norm", "", [Series("L2 norm", steps, curve("gradient_norm"))],
              marks=stability_marks(stability), marks_name="stability guard"),
        chart("Peak memory", "GiB", [
            Series("of this process", [record["step"] for record in measured],
                   [record["timing"]["peak_memory_bytes"] / 2**30 for record in measured]),
        ]),
    ]  # fmt: skip
    return f"<h2>Curves</h2><div class=charts>{''.join(plots)}</div>"


def _strata(validations: list[dict[str, Any]]) -> str:
    if not validations:
        return ""
    last = validations[-1]["ema"]
    rows = []
    for kind, key in (("condition", "by_condition"), ("stratum", "by_stratum")):
        for name, value in last[key].items():
            rows.append([
                f"{kind} {name or '(none)'}", f"{value['rows']:,}", f"{value['loss']:.4f}",
                f"{100 * value['token_accuracy']:.1f} %", f"{100 * value['exact_answer']:.1f} %",
            ])  # fmt: skip
    heads = ["held-out rows (EMA weights)", "rows", "loss", "tokens right", "answers right"]
    return f"<h2>Last validation</h2>{table(heads, rows)}"


def _evaluation(evaluation: dict[str, Any]) -> str:
    families = evaluation.get("families")
    if not families:
        return ""
    rows = [
        [
            str(family["name"]),
            f"{100 * family['exact_match']:.1f} %",
            f"{100 * family['low']:.1f} to {100 * family['high']:.1f} %",
            f"{100 * family['majority']:.1f} %",
            f"{family['rows']:,}",
        ]
        for family in families
    ]
    means = evaluation.get("mean")
    if isinstance(means, int | float):
        means = {"exact_match": means}
    if isinstance(means, dict) and "exact_match" in means:
        majority = means.get("majority")
        shown = "" if majority is None else f"{100 * majority:.1f} %"
        total = f"{sum(family['rows'] for family in families):,}"
        rows.append(["mean of families", f"{100 * means['exact_match']:.1f} %", "", shown, total])
    heads = ["family", "exact match", "95 % interval", "majority answer", "rows"]
    return f"<h2>Evaluation</h2>{table(heads, rows)}"


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
