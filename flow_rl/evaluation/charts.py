"""Charts as inline SVG: sharp at every size, without scripts.

The page's style sheet colours them, so that they follow light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from flow_rl.evaluation.arena import ELO_CENTRE, Rating
from flow_rl.evaluation.curves import Curve

# One line chart, in units of its viewBox: about the width of a phone, so that its text is not shrunk there.
_WIDTH, _HEIGHT = 360.0, 210.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 44.0, 12.0, 24.0


@dataclass(frozen=True, kw_only=True)
class Whisker:
    """One row of `whisker_chart`: a value with the ends of its interval.

    `tone` is the style sheet's class of the row: `up`, `down`, `flat` or `plain`;
    `note` is printed small beside the label.
    """

    label: str
    mean: float
    low: float
    high: float
    tone: str = "flat"
    note: str = ""
    strong: bool = False


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside [low, high], about `count` of them."""
    if not (math.isfinite(low) and math.isfinite(high)) or high < low:
        raise ValueError(f"An axis needs finite ends low <= high, received {low} and {high}.")
    if high == low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1.0, 2.0, 5.0, 10.0)), key=lambda s: abs(math.log(s / rough)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    decimals = max(0, -math.floor(math.log10(step)))
    return [round(i * step, decimals) + 0.0 for i in range(first, last + 1)]


def whisker_chart(
    rows: Sequence[Whisker],
    *,
    show: Callable[[float], str],
    show_tick: Callable[[float], str] | None = None,
    reference: float | None = None,
) -> str:
    """Dots with whiskers, one row each, over a common axis.

    Positions are percentages of the width, so that text keeps its size on a phone; each row also says its
    numbers in words, which is what a screen reader reads.

    Args:
        rows: what to draw, top to bottom.
        show: formats a value.
        show_tick: formats a number of the axis; `show` if omitted.
        reference: value of a vertical line that is always in view, such as 0 for gains.
    """
    ends = [value for row in rows for value in (row.low, row.high)] + ([] if reference is None else [reference])
    margin = 0.06 * (max(ends) - min(ends)) or 1.0
    low, high = min(ends) - margin, max(ends) + margin

    def place(value: float) -> str:
        return f"{100.0 * (value - low) / (high - low):.2f}%"

    ticks = [tick for tick in nice_ticks(low, high) if 0.02 < (tick - low) / (high - low) < 0.98]
    lines = "".join(f'<line class="rule" x1="{place(t)}" x2="{place(t)}" y1="0" y2="100%"/>' for t in ticks)
    if reference is not None:
        at = place(reference)
        lines += f'<line class="reference" x1="{at}" x2="{at}" y1="0" y2="100%"/>'
    body = "".join(_whisker_row(row, lines, place, show) for row in rows)
    tick_text = show_tick or show
    axis = "".join(f'<text x="{place(t)}" y="12" text-anchor="middle">{escape(tick_text(t))}</text>' for t in ticks)
    return f'<div class="whiskers">{body}<div class="axis" aria-hidden="true"><svg>{axis}</svg></div></div>'


def _whisker_row(row: Whisker, lines: str, place: Callable[[float], str], show: Callable[[float], str]) -> str:
    left, dot, right = place(row.low), place(row.mean), place(row.high)
    caps = "".join(f'<line class="whisker" x1="{x}" x2="{x}" y1="35%" y2="65%"/>' for x in (left, right))
    track = (
        f'<svg aria-hidden="true">{lines}{caps}'
        f'<line class="whisker" x1="{left}" x2="{right}" y1="50%" y2="50%"/>'
        f'<circle cx="{dot}" cy="50%" r="5"/></svg>'
    )
    strong = " strong" if row.strong else ""
    note = f" <small>{escape(row.note)}</small>" if row.note else ""
    return (
        f'<div class="row {escape(row.tone)}{strong}">'
        f'<span class="label">{escape(row.label)}{note}</span>{track}'
        f'<span class="value"><b>{escape(show(row.mean))}</b> '
        f'<span class="ci">[{escape(show(row.low))}, {escape(show(row.high))}]</span></span></div>'
    )


def line_chart(curve: Curve) -> str:
    """A line with an optional band, its last value written beside it."""
    edges = [value for values in (curve.y, curve.low, curve.high) if values is not None for value in values]
    finite = [float(value) for value in edges if math.isfinite(value)]
    low, high = min(finite), max(finite)
    margin = 0.08 * (high - low) or 0.5 * abs(high) or 1.0
    low, high = low - margin, high + margin
    first, last = float(min(curve.x)), float(max(curve.x))

    def across(x: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * ((x - first) / (last - first) if last > first else 0.5)

    def up(y: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - y) / (high - low)

    runs = _runs(curve.x, curve.y, curve.y)
    (start_x, start_y, _), (end_x, end_y, _) = runs[0][0], runs[-1][-1]
    said = f"{curve.name}: {start_y:.4g} at {curve.x_label} {start_x:g}, {end_y:.4g} at {curve.x_label} {end_x:g}."
    frame = _frame(nice_ticks(first, last, 5), nice_ticks(low, high, 4), across, up)
    end = (
        f'<circle class="end" cx="{across(end_x):.1f}" cy="{up(end_y):.1f}" r="3.5"/>'
        f'<text class="last" x="{across(end_x) + 7:.1f}" y="{up(end_y) + 4:.1f}">{end_y:.3g}</text>'
    )
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" aria-label="{escape(said)}">'
        f"{frame}{_band(curve, across, up)}{_lines(runs, across, up)}{end}</svg>"
    )


_Scale = Callable[[float], float]
_Run = list[tuple[float, float, float]]  # (x, low, high) of neighbouring points


def _band(curve: Curve, across: _Scale, up: _Scale) -> str:
    if curve.low is None or curve.high is None:
        return ""
    polygons = []
    for run in _runs(curve.x, curve.low, curve.high):
        outline = [(across(x), up(top)) for x, _, top in run]
        outline += [(across(x), up(bottom)) for x, bottom, _ in reversed(run)]
        polygons.append(f'<polygon class="band" points="{_points(outline)}"/>')
    return "".join(polygons)


def _lines(runs: Sequence[_Run], across: _Scale, up: _Scale) -> str:
    lines = (_points([(across(x), up(y)) for x, y, _ in run]) for run in runs)
    return "".join(f'<polyline class="line" points="{points}"/>' for points in lines)


def _frame(x_ticks: list[float], y_ticks: list[float], across: _Scale, up: _Scale) -> str:
    parts = []
    for tick in y_ticks:
        y = up(tick)
        parts.append(f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        parts.append(f'<text x="{across(tick):.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{tick:g}</text>')
    return "".join(parts)


def _runs(x: Sequence[float], low: Sequence[float], high: Sequence[float]) -> list[_Run]:
    """Stretches without a gap: NaN ends one."""
    runs: list[_Run] = [[]]
    for point in zip(map(float, x), map(float, low), map(float, high), strict=True):
        if all(math.isfinite(value) for value in point):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def rating_chart(ratings: Mapping[str, Rating]) -> str:
    """Arena ratings with their intervals, strongest first."""
    rows = [
        Whisker(label=name, mean=rating.elo, low=rating.low, high=rating.high, tone="plain")
        for name, rating in sorted(ratings.items(), key=lambda item: -item[1].elo)
    ]
    return whisker_chart(rows, show=lambda value: f"{value:.0f}", reference=ELO_CENTRE)
