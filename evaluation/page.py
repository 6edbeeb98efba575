"""A report as one HTML page: no network, no scripts, images inside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from evaluation.charts import line_chart
from evaluation.comparisons import comparison_cards
from evaluation.curves import Curve
from evaluation.pipeline_picture import pipeline_picture
from evaluation.records import Report
from evaluation.score_sections import (
    OVERALL,
    arena_charts,
    claims_table,
    gain_chart,
    reward_table,
    score_tables,
    scrolling,
    signed,
    task_title,
    tone,
)

_STYLE = Path(__file__).with_name("page.css")


def render_page(report: Report) -> str:
    """The whole page as a string."""
    sections = [(anchor, title, body) for anchor, title, body in _sections(report) if body]
    links = "".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title, _ in sections)
    body = "\n".join(
        f'<section id="{anchor}"><h2>{escape(title)}</h2>\n{content}</section>' for anchor, title, content in sections
    )
    title = escape(report.title)
    summary = "".join(f"<p>{escape(paragraph)}</p>" for paragraph in report.summary)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{_STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
        f"<header><h1>{title}</h1>{summary}{_tiles(report)}"
        f'<nav aria-label="Sections">{links}</nav></header>\n'
        f"<main>\n{body}\n</main>\n"
        "<footer>Intervals are 95\u00a0%, resampled by prompt where they belong to scores. The same numbers, "
        "for programs: report.json beside this page.</footer>\n</body>\n</html>\n"
    )


def _sections(report: Report) -> Iterator[tuple[str, str, str]]:
    """Anchor, title and content of every section; those without content are left out of the page."""
    yield "pipeline", "What was made from what", pipeline_picture(report.pipeline)
    yield "claims", "Does it hold?", claims_table(report)
    yield "gains", f"Gain over {report.models[0]}", gain_chart(report)
    yield "scores", "Scores", score_tables(report)
    yield "arena", "Arena", arena_charts(report)
    yield "reward", "The reward model", reward_table(report)
    yield "images", "Images, prompt by prompt", comparison_cards(report)
    yield "curves", "Learning curves", _curves(report)
    yield "time", "Time", _seconds(report.seconds)
    yield "reproduce", "Reproduce", _commands(report)
    yield "settings", "Settings", _settings(report.settings)
    yield "limits", "What this does not show", "".join(f"<p>{escape(note)}</p>" for note in report.notes)


def _tiles(report: Report) -> str:
    tiles = []
    show = signed(report.score_format)
    unit = " points" if report.score_format.endswith("%") else ""
    for task, gains in report.gains.items():
        overall = gains.get(OVERALL)
        if overall is not None:
            detail = f"{show(overall.low)} to {show(overall.high)} (95\u00a0%), {overall.n} prompts"
            title = f"{task_title(task)}: gain, {report.score_name}"
            tiles.append((tone(overall), title, show(overall.mean) + unit, detail))
    parts = [gain for gains in report.gains.values() for name, gain in gains.items() if name != OVERALL]
    if parts:
        risen, fallen = (sum(tone(gain) == way for gain in parts) for way in ("up", "down"))
        detail = f"{fallen} fell, {len(parts) - risen - fallen} undecided"
        tiles.append(("", "Categories that rose", f"{risen} of {len(parts)}", detail))
    if report.seconds:
        longest = max(report.seconds, key=report.seconds.__getitem__)
        total = _duration(sum(report.seconds.values()))
        tiles.append(("", "Time of all stages, added up", total, f"most of it: {longest}"))
    content = "".join(
        f'<div class="tile {look}"><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(detail)}</small></dd></div>'
        for look, name, value, detail in tiles
    )
    return _wrap('<dl class="tiles">', content, "</dl>")


def _curves(report: Report) -> str:
    figures = "".join(
        f"<figure><figcaption>{escape(curve.name)} <small>{escape(_axes(curve))}</small></figcaption>"
        f"{line_chart(curve)}</figure>"
        for curve in report.curves
    )
    return _wrap('<div class="charts">', figures, "</div>")


def _axes(curve: Curve) -> str:
    return f"{curve.y_label} by {curve.x_label}" if curve.y_label else f"by {curve.x_label}"


def _seconds(seconds: Mapping[str, float]) -> str:
    longest = max(seconds.values(), default=0.0) or 1.0
    rows = "".join(
        f'<tr><th scope="row">{escape(stage)}</th><td>{_duration(value)}</td>'
        f'<td class="share"><span class="bar" style="width:{100 * value / longest:.1f}%"></span></td></tr>'
        for stage, value in seconds.items()
    )
    total = _duration(sum(seconds.values()))
    last = f'<tr class="strong"><th scope="row">added up</th><td>{total}</td><td></td></tr>'
    head = '<tr><th scope="col">stage</th><th scope="col">time</th><td></td></tr>'
    table = f"<table><thead>{head}</thead><tbody>{rows}{last}</tbody></table>"
    return scrolling(table, "Time by stage") if rows else ""


def _commands(report: Report) -> str:
    lead = '<p class="lead">Run these from the root of the repository, in this order.</p><pre tabindex="0">'
    return _wrap(lead, escape("\n".join(report.commands)), "</pre>")


def _settings(settings: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td class="text">{escape(str(value))}</td></tr>'
        for key, value in _flatten(settings)
    )
    return scrolling(f'<table class="settings"><tbody>{rows}</tbody></table>', "Settings") if rows else ""


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _duration(seconds: float) -> str:
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _wrap(before: str, content: str, after: str) -> str:
    return f"{before}{content}{after}" if content else ""
