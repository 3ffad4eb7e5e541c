"""report.html: what a run was and how it went, in one file that needs no server and no network."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from hrmtext.artifacts.layout import RunFolder
from hrmtext.errors import CheckpointError
from hrmtext.runtime.io import write_text
from hrmtext.train.chart import Series, chart, smooth
from hrmtext.train.metrics import read_metrics
from hrmtext.train.progress import format_time
from hrmtext.train.report_watch import (
    forgetting_section,
    inside_section,
    stability_marks,
    stability_section,
)

STYLE = """
:root { --back:#fff; --ink:#1c2024; --dim:#68707a; --line:#e3e6ea; --card:#f7f8fa;
  --c0:#2563eb; --c1:#d9480f; --c2:#2b8a3e; --c3:#862e9c; --c4:#b08800; --c5:#0b7285; }
@media (prefers-color-scheme: dark) { :root { --back:#14171a; --ink:#e6e8ea; --dim:#98a1ab;
  --line:#2c3238; --card:#1b1f23; --c0:#74a5ff; --c1:#ff922b; --c2:#69db7c; --c3:#da77f2;
  --c4:#ffd43b; --c5:#3bc9db; } }
body { background:var(--back); color:var(--ink); margin:0 auto; max-width:1120px; padding:24px;
  font:15px/1.5 system-ui, sans-serif; }
h1 { font-size:24px; margin:0; } h2 { font-size:17px; margin:28px 0 8px; }
.dim { color:var(--dim); }
.facts { display:grid; grid-template-columns:repeat(auto-fill,minmax(190px,1fr)); gap:8px; }
.facts div, figure { background:var(--card); border:1px solid var(--line); border-radius:8px; }
.facts div { padding:8px 12px; } .facts b { display:block; font-size:17px; }
.charts { display:grid; gap:12px;
  grid-template-columns:repeat(auto-fill,minmax(min(100%,500px),1fr)); }
figure { margin:0; padding:10px; } figcaption { font-weight:600; padding:0 4px; }
svg { display:block; width:100%; height:auto; } svg text { fill:var(--dim); font-size:12px; }
.mark { stroke:var(--c1); stroke-width:1.2; stroke-dasharray:2 3; }
.key i.marked { height:0; border-top:2px dotted var(--c1); }
.grid { stroke:var(--line); } .curve { fill:none; stroke-width:1.8; }
.faint { opacity:.3; stroke-width:1.2; } .dot { stroke:none; }
.key { margin:2px 4px; font-size:13px; color:var(--dim); } .key span { margin-right:14px; }
.key i { display:inline-block; width:14px; height:3px; margin-right:5px; vertical-align:middle; }
table { border-collapse:collapse; width:100%; } th, td { padding:5px 10px; text-align:right;
  border-bottom:1px solid var(--line); } th:first-child, td:first-child { text-align:left; }
pre { background:var(--card); border:1px solid var(--line); border-radius:8px; padding:12px;
  overflow:auto; } .scroll { overflow-x:auto; }
"""


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
    parts = [
        f"<h1>{html.escape(run.path.resolve().name)}</h1>",
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
    title = html.escape(f"{run.path.resolve().name} · hrm-text")
    page = (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    write_text(run.report_file, page)
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
    boxes = "".join(f"<div><span class=dim>{n}</span><b>{v}</b></div>" for n, v in facts)
    return f"<div class=facts>{boxes}</div>" if facts else "<p>No steps yet.</p>"


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
    return f"<h2>Checkpoints</h2>{_table(['checkpoint', 'validation loss, EMA'], rows)}"


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
    return f"<h2>Last validation</h2>{_table(heads, rows)}"


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
    return f"<h2>Evaluation</h2>{_table(heads, rows)}"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<div class=scroll><table><tr>{head}</tr>{body}</table></div>"


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
