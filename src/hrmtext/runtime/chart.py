"""Charts as inline SVG, lines and bars: axes with ticks, a legend, values on hover."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 520, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 10, 12, 34
MAX_POINTS = 600
NUM_COLORS = 6
BAR_LEFT, BAR_ROW, BAR_NAME_CHARS = 210, 22, 34


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    faint: bool = False
    """Drawn thin and pale, behind the others."""
    dots: bool = False
    """With a dot at each value."""


@dataclasses.dataclass(frozen=True)
class Mark:
    """Something that happened at a place of the horizontal axis."""

    x: float
    text: str
    """Shown on hover."""


def chart(
    title: str,
    unit: str,
    series: Sequence[Series],
    x_name: str = "step",
    marks: Sequence[Mark] = (),
    marks_name: str = "",
) -> str:
    """A figure with every series that has a finite value; an empty string where none has.

    Args:
        unit: of the vertical axis.
        marks: vertical lines behind the curves, within their range; `marks_name` in the legend.
        x_name: what the horizontal axis counts.
    """
    lines = [(index, _finite(one)) for index, one in enumerate(series)]
    lines = [(index, one) for index, one in lines if one.x]
    if not lines:
        return ""
    x_ticks = ticks(min(min(s.x) for _, s in lines), max(max(s.x) for _, s in lines))
    low, high = (pick(pick(s.y) for _, s in lines) for pick in (min, max))
    y_ticks = ticks(low, high)
    x_range = (min(min(s.x) for _, s in lines), max(max(s.x) for _, s in lines))
    y_range = (min(low, y_ticks[0]), max(high, y_ticks[-1]))
    body = [_axes(x_ticks, y_ticks, x_range, y_range, unit, x_name)]
    marks = [mark for mark in marks if x_range[0] <= mark.x <= x_range[1]]
    for mark in marks:
        x, _ = _place(mark.x, y_range[0], x_range, y_range)
        body.append(
            f'<line class=mark x1="{x}" x2="{x}" y1={TOP} y2={HEIGHT - BOTTOM}>'
            f"<title>{html.escape(mark.text)}</title></line>"
        )
    body += [_line(one, index % NUM_COLORS, x_range, y_range, x_name) for index, one in lines]
    legend = "".join(
        f'<span><i style="background:var(--c{index % NUM_COLORS});'
        f'opacity:{0.4 if one.faint else 1}"></i>{html.escape(one.name)}</span>'
        for index, one in lines
    )
    if marks:
        legend += f"<span><i class=marked></i>{html.escape(marks_name)}</span>"
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f"{''.join(body)}</svg><div class=key>{legend}</div></figure>"
    )


def bars(
    title: str,
    unit: str,
    edges: Sequence[float],
    heights: Sequence[tuple[str, Sequence[float]]],
    x_name: str,
) -> str:
    """Histograms, their bars side by side; an empty string where all are zero.

    Args:
        unit: of the vertical axis.
        edges: (K + 1) ascending, where bars begin and end; drawn equally wide, for edges that grow
            by a factor.
        heights: name and (K) values of each histogram.
        x_name: what the edges count.
    """
    high = max((value for _, values in heights for value in values), default=0)
    if not high > 0:
        return ""
    y_ticks = ticks(0, high)
    x_range, y_range = (0.0, float(len(edges) - 1)), (0.0, y_ticks[-1])
    body = [_axes([], y_ticks, x_range, y_range, unit, x_name)]
    stride = -(-len(edges) // 12)
    for place in range(0, len(edges), stride):
        x, y = _place(place, 0, x_range, y_range)
        body.append(f'<text x="{x}" y={y + 17} text-anchor=middle>{number(edges[place])}</text>')
    width = 0.84 / len(heights)
    for color, (name, values) in enumerate(heights):
        for place, value in enumerate(values):
            start = place + 0.08 + width * color
            left, base = _place(start, 0, x_range, y_range)
            right, top = _place(start + width, value, x_range, y_range)
            body.append(
                f'<rect class=bar x="{left}" y="{top}" width="{right - left:.1f}" '
                f'height="{base - top:.1f}" style="fill:var(--c{color % NUM_COLORS})"><title>'
                f"{html.escape(name)}: {number(value)} at {edges[place]:,.0f} to "
                f"{edges[place + 1]:,.0f}</title></rect>"
            )
    legend = "".join(
        f'<span><i style="background:var(--c{color % NUM_COLORS})"></i>{html.escape(name)}</span>'
        for color, (name, _) in enumerate(heights)
    )
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f"{''.join(body)}</svg><div class=key>{legend}</div></figure>"
    )


def shares(title: str, parts: Sequence[tuple[str, float]], most: int = 10) -> str:
    """Horizontal bars of names and shares (0 to 1); an empty string without any.

    Args:
        most: bars drawn, in the given order; the rest is one bar.
    """
    shown = list(parts[:most])
    if len(parts) > most:
        shown.append((f"{len(parts) - most} others", sum(share for _, share in parts[most:])))
    high = max((share for _, share in shown), default=0)
    if not high > 0:
        return ""
    rows = []
    for place, (name, share) in enumerate(shown):
        y = 8 + place * BAR_ROW
        label = name if len(name) <= BAR_NAME_CHARS else name[: BAR_NAME_CHARS - 1] + "…"
        width = share / high * (WIDTH - BAR_LEFT - 62)
        rows.append(
            f'<text x={BAR_LEFT - 6} y="{y + 12}" text-anchor=end>{html.escape(label)}'
            f"<title>{html.escape(name)}</title></text>"
            f'<rect class=bar x={BAR_LEFT} y="{y}" width="{max(width, 0.5):.1f}" '
            f'height={BAR_ROW - 6} style="fill:var(--c0)"/>'
            f'<text x="{BAR_LEFT + width + 5:.1f}" y="{y + 12}">{100 * share:.3g} %</text>'
        )
    height = 14 + len(shown) * BAR_ROW
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(title)}">'
        f"{''.join(rows)}</svg></figure>"
    )


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) around `low` to `high`, at least two."""
    if not high > low:
        span = abs(low) * 0.1 or 1.0
        low, high = low - span, high + span
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def smooth(values: Sequence[float], span: int | None = None) -> list[float]:
    """Exponential mean, unbiased from the first value on; span: a thirtieth of the length."""
    span = span or max(1, len(values) // 30)
    keep = 1.0 - 1.0 / span
    total = weight = 0.0
    means = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1.0
        means.append(total / weight)
    return means


def number(value: float) -> str:
    """Short form for axis labels: 0.0022, 2.2e-05, 1.5k, 3M."""
    size = abs(value)
    for factor, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= factor * 0.9999:
            return f"{value / factor:.4g}{suffix}"
    return "0" if size < 1e-15 else f"{value:.4g}"


def _finite(series: Series) -> Series:
    pairs = [
        (x, y)
        for x, y in zip(series.x, series.y, strict=True)
        if math.isfinite(x) and math.isfinite(y)
    ]
    stride = max(1, -(-len(pairs) // MAX_POINTS))
    # The newest value is always shown.
    pairs = pairs[(len(pairs) - 1) % stride :: stride] if pairs else []
    return dataclasses.replace(series, x=[x for x, _ in pairs], y=[y for _, y in pairs])


def _place(
    x: float, y: float, x_range: tuple[float, float], y_range: tuple[float, float]
) -> tuple[float, float]:
    width = (x_range[1] - x_range[0]) or 1.0
    height = (y_range[1] - y_range[0]) or 1.0
    across = LEFT + (x - x_range[0]) / width * (WIDTH - LEFT - RIGHT)
    down = HEIGHT - BOTTOM - (y - y_range[0]) / height * (HEIGHT - TOP - BOTTOM)
    return round(across, 1), round(down, 1)


def _axes(
    x_ticks: list[float],
    y_ticks: list[float],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    unit: str,
    x_name: str,
) -> str:
    parts = []
    for value in y_ticks:
        _, y = _place(x_range[0], value, x_range, y_range)
        parts.append(f'<line class=grid x1={LEFT} x2={WIDTH - RIGHT} y1="{y}" y2="{y}"/>')
        parts.append(f'<text x={LEFT - 6} y="{y + 4}" text-anchor=end>{number(value)}</text>')
    for value in x_ticks:
        if not x_range[0] <= value <= x_range[1]:
            continue
        x, _ = _place(value, y_range[0], x_range, y_range)
        bottom = HEIGHT - BOTTOM
        parts.append(f'<line class=grid x1="{x}" x2="{x}" y1={bottom} y2={bottom + 4} />')
        parts.append(f'<text x="{x}" y={bottom + 17} text-anchor=middle>{number(value)}</text>')
    parts.append(f"<text x={WIDTH - RIGHT} y={HEIGHT - 3} text-anchor=end>{x_name}</text>")
    if unit:
        parts.append(f"<text x={LEFT + 4} y={TOP + 2}>{html.escape(unit)}</text>")
    return "".join(parts)


def _line(
    series: Series,
    color: int,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    x_name: str,
) -> str:
    places = [_place(x, y, x_range, y_range) for x, y in zip(series.x, series.y, strict=True)]
    path = " ".join(f"{x},{y}" for x, y in places)
    last = f"{html.escape(series.name)}: {number(series.y[-1])} at {x_name} {series.x[-1]:,.0f}"
    kind = "curve faint" if series.faint else "curve"
    parts = [
        f'<polyline class="{kind}" style="stroke:var(--c{color})" points="{path}">'
        f"<title>{last}</title></polyline>"
    ]
    if series.dots or len(places) == 1:
        for (x, y), step, value in zip(places, series.x, series.y, strict=True):
            parts.append(
                f'<circle class=dot cx="{x}" cy="{y}" r=3 style="fill:var(--c{color})"><title>'
                f"{html.escape(series.name)}: {number(value)} at {x_name} {step:,.0f}"
                "</title></circle>"
            )
    return "".join(parts)
