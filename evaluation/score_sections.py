"""The sections of a report that show scores: gains, tables of intervals, arena ratings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape

from evaluation.arena import ELO_CENTRE, Rating
from evaluation.charts import Whisker, whisker_chart
from evaluation.records import Report
from evaluation.statistics import Interval

OVERALL = "overall"
_TASK_TITLES = {"t2i": "Text to image", "edit": "Editing"}
#: metric of a reward model -> heading and format
_REWARD_COLUMNS = {
    "srcc": ("rank correlation", ".3f"),
    "pairwise_accuracy": ("pairs ordered alike", ".1%"),
    "parse_rate": ("readable answers", ".1%"),
    "count": ("images", ".0f"),
}


def gain_chart(report: Report) -> str:
    """Dots and whiskers of the gains, one chart a task, `overall` first; empty without gains."""
    if not any(report.gains.values()):
        return ""
    unit = " in percentage points" if _is_percent(report.score_format) else ""
    lead = (
        f"Change of the {report.score_name}{unit} from {report.models[0]} to {report.models[-1]} on the same "
        "prompts, with its 95\u00a0% interval. A filled dot: the interval excludes zero."
    )
    show, show_tick = signed(report.score_format), _signed_tick(report.score_format)
    charts = []
    for task, gains in report.gains.items():
        # A stable sort on one flag: only `overall` moves, to the front.
        names = sorted(gains, key=lambda name: name != OVERALL)
        rows = [_gain_row(name, gains[name]) for name in names]
        if rows:
            chart = whisker_chart(rows, show=show, show_tick=show_tick, reference=0.0)
            charts.append(f'{_task_heading(task, report.gains)}<div class="panel">{chart}</div>')
    return f'<p class="lead">{escape(lead)}</p>{"".join(charts)}'


def claims_table(report: Report) -> str:
    """What should hold, with what was found; empty without claims."""
    rows = "".join(
        f'<tr><td class="claim">{escape(c.text)}</td><td class="claim">{escape(c.found)}</td>'
        f'<td><span class="verdict {escape(c.verdict)}">{escape(c.verdict)}</span></td></tr>'
        for c in report.claims
    )
    return f'<div class="panel"><table class="claims"><tbody>{rows}</tbody></table></div>' if rows else ""


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
    for task, parts in report.bench_parts.items():
        if parts:
            caption = f"{_TASK_TITLES[task]}: what the pillars are made of."
            table = _table(parts, report, "second level, facet", caption)
            tables.append(f"<details><summary>{escape(caption)}</summary>{table}</details>")
    name = report.score_name[:1].upper() + report.score_name[1:]
    tables += [
        _table(
            categories,
            report,
            "category",
            f"{_TASK_TITLES[task]}: {name} by category: mean, 95\u00a0% interval, n prompts.",
        )
        for task, categories in report.categories.items()
        if categories
    ]
    return "".join(tables)


def arena_charts(report: Report) -> str:
    """Ratings with intervals, strongest first, a chart a task and small ones by category; empty without battles."""
    charts = []
    for task, ratings in (report.arena or {}).items():
        if not ratings:
            continue
        charts.append(f'<h3>{escape(_TASK_TITLES[task])}</h3><div class="panel">{_rating_chart(ratings)}</div>')
        panels = "".join(
            f'<div class="panel"><h4>{escape(category)}</h4>{_rating_chart(found)}</div>'
            for category, found in report.arena_categories.get(task, {}).items()
        )
        charts.append(f'<div class="by-category">{panels}</div>' if panels else "")
    lead = (
        '<p class="lead">Bradley-Terry ratings on the Elo scale, mean 1000, with 95\u00a0% intervals resampled by '
        "prompt. Ten points more are an expected win rate of 51.4\u00a0%, fifty 57.1\u00a0%, a hundred 64.0\u00a0%.</p>"
    )
    return lead + "".join(charts) if charts else ""


def reward_table(report: Report) -> str:
    """How well the reward model agrees with held-out annotations, by dimension; empty where there is none."""
    if not report.reward_model:
        return ""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("dimension", *dict(_REWARD_COLUMNS.values())))
    body = "".join(
        f'<tr><th scope="row">{escape(dimension.replace("_", " "))}</th>{_reward_cells(found)}</tr>'
        for dimension, found in report.reward_model.items()
    )
    lead = (
        '<p class="lead">A vision-language model that was fine-tuned to score images from 1 to 5, against annotations '
        "that it has not seen: the rank correlation of its scores, and the share of pairs with different annotations "
        "that it orders alike.</p>"
    )
    return lead + scrolling(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>", "The reward model")


def _reward_cells(found: Mapping[str, float]) -> str:
    return "".join(
        f"<td>{format(found[name], form) if name in found else '–'}</td>" for name, (_, form) in _REWARD_COLUMNS.items()
    )


def _rating_chart(ratings: Mapping[str, Rating]) -> str:
    rows = [
        Whisker(label=name, mean=rating.elo, low=rating.low, high=rating.high, tone="plain")
        for name, rating in sorted(ratings.items(), key=lambda item: -item[1].elo)
    ]
    return whisker_chart(rows, show=lambda value: f"{value:.0f}", reference=ELO_CENTRE)


def _task_heading(task: str, tasks: Mapping[str, object]) -> str:
    """A heading where there is more than one task to tell apart."""
    return f"<h3>{escape(_TASK_TITLES[task])}</h3>" if len(tasks) > 1 else ""


def task_title(task: str) -> str:
    """A task in words."""
    return _TASK_TITLES[task]


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
        strong = ' class="strong"' if name == OVERALL else ' class="part"' if "/" in name else ""
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
