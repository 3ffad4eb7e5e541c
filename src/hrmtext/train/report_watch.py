"""The parts of the report on what the stability guard did, and on what happened inside."""

from __future__ import annotations

import html
from typing import Any

from hrmtext.runtime.chart import Mark
from hrmtext.train.heat import heat_map
from hrmtext.train.stability import EASING

Records = list[dict[str, Any]]
MAX_ACTIONS = 30

CALLS = (
    ("lens_kl", "Logit lens: distance from the final prediction", "nats"),
    ("change", "Change of the state since the stack's call before", "of its norm"),
    ("gradient_norm", "Gradient norm by the output of each call", ""),
    ("state_rms", "State before the exit norm, root mean square", ""),
)
MODULES = (
    ("module_gradient_norm", "Gradient norm by module", ""),
    ("update_ratio", "Update relative to the weights, by module", ""),
    ("gradient_tail", "Gradient tail: 99.9th percentile over median, by module", ""),
)
"""Quantity of a telemetry record, title of its heat map, unit."""


def stability_marks(records: Records) -> list[Mark]:
    """A mark for every step that was left out, damped, or where a brake set in."""
    return [
        Mark(record["step"], f"step {record['step']:,}: {record['action']}, {record['reason']}")
        for record in records
        if record["reason"] != EASING
    ]


def stability_section(records: Records) -> str:
    """What the guard did, the newest first; a sentence where it had nothing to do."""
    if not records:
        return ""
    totals = records[-1]["totals"]
    verb = "" if records[-1]["applied"] else " would have been"
    summary = (
        f"Steps that{verb} left out: {totals['skip']}, damped: {totals['damp']}, "
        f"at a lower rate: {totals['brake']}."
    )
    shown = [record for record in records if record["reason"] != EASING]
    rows = "".join(
        f"<tr><td>{record['step']:,}</td><td>{html.escape(record['action'])}</td>"
        f"<td>{record['loss']:.4f}</td><td>{record['gradient_factor']:.3g}</td>"
        f"<td>{record['rate']:.2g}</td><td>{html.escape(record['reason'])}</td></tr>"
        for record in shown[: -MAX_ACTIONS - 1 : -1]
    )
    more = f" The newest {MAX_ACTIONS} of {len(shown)}:" if len(shown) > MAX_ACTIONS else ""
    return (
        f"<h2>Stability</h2><p>{summary}{more}</p><div class=scroll><table><tr><th>step</th>"
        "<th>action</th><th>loss</th><th>gradient, times its median</th><th>rate</th>"
        f"<th>reason</th></tr>{rows}</table></div>"
    )


def inside_section(records: Records) -> str:
    """Heat maps of the telemetry: by stack call, and by module."""
    steps = [record["step"] for record in records]
    figures = []
    for quantity, title, unit in CALLS + MODULES:
        columns = [record.get(quantity, {}) for record in records]
        rows = list(dict.fromkeys(name for column in columns for name in column))
        rows.sort(key=_execution_order)
        figures.append(heat_map(title, unit, steps, columns, rows))
    if not any(figures):
        return ""
    note = (
        "<p class=dim>Rows are stack calls in the order of execution: 1.L2 is the second L call of "
        "the first H cycle.</p>"
    )
    return f"<h2>Inside the recurrence</h2>{note}<div class=charts>{''.join(figures)}</div>"


def forgetting_section(records: Records) -> str:
    """Held-out rows of the base mixture, before and after."""
    if not records:
        return ""
    last = records[-1]
    names = {"loss": ("loss, nats a token", 1.0, ""), "token_accuracy": ("tokens right", 100, " %"),
             "exact_answer": ("answers right", 100, " %")}  # fmt: skip
    rows = "".join(
        f"<tr><td>{title}</td><td>{_value(last['before'], key, factor, unit)}</td>"
        f"<td>{_value(last['after'], key, factor, unit)}</td></tr>"
        for key, (title, factor, unit) in names.items()
    )
    return (
        "<h2>Forgetting</h2><p class=dim>Held-out rows of the base mixture, before and at step "
        f"{last['step']:,} (EMA weights).</p><div class=scroll><table><tr><th></th><th>before</th>"
        f"<th>after</th></tr>{rows}</table></div>"
    )


def _value(scores: dict[str, Any], key: str, factor: float, unit: str) -> str:
    if key not in scores:
        return ""
    return f"{factor * scores[key]:.1f}{unit}" if unit else f"{factor * scores[key]:.4f}"


def _execution_order(name: str) -> tuple[int, bool, int]:
    """`1.H` runs after `1.L3`; names of modules keep their order."""
    cycle, _, call = name.partition(".")
    if not cycle.isdigit():
        return (0, False, 0)
    return (int(cycle), call == "H", int(call[1:] or 0))
