"""Heat maps as inline SVG: one row a name, one column a step, deeper color for larger values."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from hrmtext.runtime.chart import WIDTH, number

LEFT, RIGHT, TOP, BOTTOM = 112, 10, 4, 34
ROW = 22
MAX_COLUMNS = 60
FAINTEST = 0.06


def heat_map(
    title: str,
    unit: str,
    steps: Sequence[int],
    columns: Sequence[Mapping[str, float]],
    rows: Sequence[str],
) -> str:
    """A figure over steps; values above zero on a logarithmic scale of color, exact on hover.

    Args:
        columns: values by row's name, one mapping a step; a name may be absent.
        rows: names from top to bottom. An empty string is returned where none has a value.
    """
    stride = max(1, -(-len(steps) // MAX_COLUMNS))
    start = (len(steps) - 1) % stride if steps else 0  # the newest is always shown
    steps, columns = steps[start::stride], columns[start::stride]
    logs = [
        math.log(value) for column in columns for value in column.values() if 0 < value < math.inf
    ]
    rows = [name for name in rows if any(name in column for column in columns)]
    if not logs or not rows:
        return ""
    low, high = min(logs), max(logs)
    width = (WIDTH - LEFT - RIGHT) / len(steps)
    height = TOP + ROW * len(rows) + BOTTOM
    body = []
    for index, name in enumerate(rows):
        y = TOP + ROW * index
        middle = y + ROW / 2 + 4
        body.append(f'<text x={LEFT - 6} y="{middle}" text-anchor=end>{html.escape(name)}</text>')
        for place, (step, column) in enumerate(zip(steps, columns, strict=True)):
            value = column.get(name)
            if value is None or not math.isfinite(value):
                continue
            share = (math.log(value) - low) / ((high - low) or 1.0) if value > 0 else 0.0
            opacity = FAINTEST + (1 - FAINTEST) * share
            body.append(
                f'<rect x="{LEFT + place * width:.1f}" y="{y + 1}" width="{max(1, width - 1):.1f}" '
                f'height="{ROW - 2}" style="fill:var(--c0);fill-opacity:{opacity:.3f}"><title>'
                f"{html.escape(name)}: {number(value)} at step {step:,}</title></rect>"
            )
    foot = TOP + ROW * len(rows) + 16
    shown = sorted({0, len(steps) // 2, len(steps) - 1})
    for place in shown:
        x = LEFT + (place + 0.5) * width
        body.append(f'<text x="{x:.1f}" y={foot} text-anchor=middle>{number(steps[place])}</text>')
    body.append(f"<text x={WIDTH - RIGHT} y={foot + 14} text-anchor=end>step</text>")
    scale = f"{number(math.exp(low))} to {number(math.exp(high))} {unit}".strip()
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(title)}">'
        f"{''.join(body)}</svg><div class=key>pale to deep: {html.escape(scale)}</div></figure>"
    )
