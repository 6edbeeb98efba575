"""The sections of a report that show scores: gains, tables of intervals, arena ratings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape

from evaluation.charts import Whisker, whisker_chart
from evaluation.records import Report
from evaluation.statistics import Interval

OVERALL = "overall"
_TASK_TITLES = {"t2i": "Text to image", "edit": "Editing"}


def gain_chart(report: Report) -> str:
    """Dots and whiskers of the gains, `overall` first; empty without gains."""
    if not report.gains:
        return ""
    # A stable sort on one flag: only `overall` moves, to the front.
    names = sorted(report.gains, key=lambda name: name != OVERALL)
    rows = [_gain_row(name, report.gains[name]) for name in names]
    unit = " in percentage points" if _is_percent(report.score_format) else ""
    lead = (
        f"Change of the {report.score_name}{unit} from {report.models[0]} to {report.models[-1]} on the same "
        "prompts, with its 95\u00a0% interval. A filled dot: the interval excludes zero."
    )
    chart = whisker_chart(
        rows, show=signed(report.score_format), show_tick=_signed_tick(report.score_format), reference=0.0
    )
    return f'<p class="lead">{escape(lead)}</p><div class="panel">{chart}</div>'


def score_tables(report: Report) -> str:
    """One table a task of the bench, and one by category."""
    tables = [
        _table(
            pillars,
            report,
            "pillar",
            f"{_TASK_TITLES[task]}: mean, 95\u00a0% interval, n prompts; higher is better.",
        )
        for task, pillars in report.bench.items()
        if pillars
    ]
    if report.categories:
        name = report.score_name[:1].upper() + report.score_name[1:]
        tables.append(
            _table(
                report.categories,
                report,
                "category",
                f"{name} by category: mean, 95\u00a0% interval, n prompts.",
            )
        )
    return "".join(tables)


def arena_charts(report: Report) -> str:
    """Ratings with intervals, one chart a task, strongest first; empty without battles."""
    charts = []
    for task, ratings in (report.arena or {}).items():
        rows = [
            Whisker(label=name, mean=rating.elo, low=rating.low, high=rating.high, tone="plain")
            for name, rating in sorted(ratings.items(), key=lambda item: -item[1].elo)
        ]
        if rows:
            chart = whisker_chart(rows, show=lambda value: f"{value:.0f}")
            charts.append(f'<h3>{escape(_TASK_TITLES[task])}</h3><div class="panel">{chart}</div>')
    lead = '<p class="lead">Bradley-Terry ratings on the Elo scale, mean 1000, with 95 % intervals.</p>'
    return lead + "".join(charts) if charts else ""


def tone(gain: Interval) -> str:
    """`up` or `down` where the interval excludes zero, else `flat`."""
    if gain.low > 0:
        return "up"
    return "down" if gain.high < 0 else "flat"


def signed(score_format: str) -> Callable[[float], str]:
    """Format of differences; those of percentages are percentage points and carry no sign of percent."""
    percent = _is_percent(score_format)
    factor, number = (100.0, f"+{score_format[:-1]}f") if percent else (1.0, f"+{score_format}")
    # A typographic minus is as wide as the plus, so columns of gains line up.
    return lambda value: format(factor * value, number).replace("-", "−")


def scrolling(table: str, label: str) -> str:
    """A table that scrolls inside its panel where it is too wide; focusable, to scroll by keyboard too."""
    region = f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">{table}</div>'
    return f'<div class="panel">{region}</div>'


def _signed_tick(score_format: str) -> Callable[[float], str]:
    factor = 100.0 if _is_percent(score_format) else 1.0
    return lambda value: f"{factor * value:+.6g}".replace("-", "−") if value else "0"


def _is_percent(score_format: str) -> bool:
    return score_format.endswith("%")


def _gain_row(name: str, gain: Interval) -> Whisker:
    return Whisker(
        label=name,
        note=f"n = {gain.n}",
        mean=gain.mean,
        low=gain.low,
        high=gain.high,
        tone=tone(gain),
        strong=name == OVERALL,
    )


def _table(rows: Mapping[str, Mapping[str, Interval]], report: Report, first: str, caption: str) -> str:
    models = [model for model in report.models if any(model in row for row in rows.values())]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in (first, *models, "n"))
    body = []
    for name, row in rows.items():
        cells = "".join(_interval_cell(row.get(model), report.score_format) for model in models)
        strong = ' class="strong"' if name == OVERALL else ""
        body.append(f'<tr{strong}><th scope="row">{escape(name)}</th>{cells}<td>{_prompts(row)}</td></tr>')
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    # The caption stays outside of the part that scrolls, so that it wraps on a phone.
    return f'<p class="caption">{escape(caption)}</p>{scrolling(table, caption)}'


def _interval_cell(interval: Interval | None, score_format: str) -> str:
    if interval is None:
        return "<td>–</td>"
    mean, low, high = (format(value, score_format) for value in (interval.mean, interval.low, interval.high))
    return f'<td>{mean}<span class="ci">{low.rstrip("%")}–{high}</span></td>'


def _prompts(row: Mapping[str, Interval]) -> str:
    """How many prompts the row's means rest on: one number, or a range where models differ."""
    counts = [interval.n for interval in row.values()]
    if not counts:
        return "–"
    return str(min(counts)) if min(counts) == max(counts) else f"{min(counts)}–{max(counts)}"
