"""A report as one HTML page. The templates hold the words and the markup, this module the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from flow_rl.evaluation.charts import line_chart, rating_chart
from flow_rl.evaluation.comparisons import card_width, shots
from flow_rl.evaluation.gains import OVERALL, gain_chart, signed, tone
from flow_rl.evaluation.pages import environment
from flow_rl.evaluation.pipeline_picture import pipeline_picture
from flow_rl.evaluation.records import Report
from flow_rl.evaluation.statistics import Interval

_TASK_TITLES = {"t2i": "Text to image", "edit": "Editing"}


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A headline number: `look` is the style sheet's class, `up`, `down`, `flat` or none."""

    name: str
    value: str
    detail: str
    look: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of the page; `content` is HTML."""

    anchor: str
    title: str
    content: Markup


def render_page(report: Report) -> str:
    """The whole page as a string."""
    templates = environment(
        card_width=card_width,
        drawn_in=_drawn_in,
        duration=_duration,
        flattened=_flattened,
        prompts=_prompts,
        shots=shots,
        task_title=_TASK_TITLES.__getitem__,
    )
    templates.tests["percent"] = lambda score_format: score_format.endswith("%")
    charts = {chart.__name__: _as_markup(chart) for chart in (gain_chart, line_chart, pipeline_picture, rating_chart)}
    templates.globals |= charts | {"overall": OVERALL}
    macros: Any = templates.get_template("sections.html.j2").module
    rendered = {anchor: Markup(getattr(macros, anchor)(report)).strip() for anchor in _titles(report)}
    sections = [
        Section(anchor=anchor, title=title, content=rendered[anchor])
        for anchor, title in _titles(report).items()
        if rendered[anchor]
    ]
    return templates.get_template("report.html.j2").render(
        title=report.title, summary=report.summary, tiles=list(_tiles(report)), sections=sections
    )


def _as_markup(chart: Any) -> Any:
    """A chart escapes what it was given by itself."""
    return lambda *args: Markup(chart(*args))


def _titles(report: Report) -> dict[str, str]:
    """Headings by anchor, in the page's order. The anchor is also the name of the section's macro."""
    return {
        "pipeline": "What was made from what",
        "claims": "Does it hold?",
        "gains": f"Gain over {report.models[0]}",
        "scores": "Scores",
        "arena": "Arena",
        "reward": "The reward model",
        "monitoring": "The hacking monitor",
        "images": "Images, prompt by prompt",
        "curves": "Learning curves",
        "time": "Time",
        "reproduce": "Reproduce",
        "settings": "Settings",
        "limits": "What this does not show",
    }


def _tiles(report: Report) -> Iterator[Tile]:
    show = signed(report.score_format)
    unit = " points" if report.score_format.endswith("%") else ""
    for task, gains in report.gains.items():
        overall = gains.get(OVERALL)
        if overall is not None:
            yield Tile(
                look=tone(overall),
                name=f"{_TASK_TITLES[task]}: gain, {report.score_name}",
                value=show(overall.mean) + unit,
                detail=f"{show(overall.low)} to {show(overall.high)} (95\u00a0%), {overall.n} prompts",
            )
    parts = [gain for gains in report.gains.values() for name, gain in gains.items() if name != OVERALL]
    if parts:
        risen, fallen = (sum(tone(gain) == way for gain in parts) for way in ("up", "down"))
        detail = f"{fallen} fell, {len(parts) - risen - fallen} undecided"
        yield Tile(name="Categories that rose", value=f"{risen} of {len(parts)}", detail=detail)
    if report.seconds:
        longest = max(report.seconds, key=report.seconds.__getitem__)
        total = _duration(sum(report.seconds.values()))
        yield Tile(name="Time of all stages, added up", value=total, detail=f"most of it: {longest}")


def _drawn_in(models: Sequence[str], rows: Mapping[str, Mapping[str, Interval]]) -> list[str]:
    """Those of the models that any of the rows has."""
    return [model for model in models if any(model in row for row in rows.values())]


def _prompts(row: Mapping[str, Interval]) -> str:
    """How many prompts the row's means rest on: one number, or a range where models differ."""
    counts = [interval.n for interval in row.values()]
    if not counts:
        return "–"
    return str(min(counts)) if min(counts) == max(counts) else f"{min(counts)}–{max(counts)}"


def _flattened(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings with dotted keys."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flattened(value, f"{prefix}{key}.")
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
