"""What a threshold keeps, for people and programs: a table, JSON, and a page with charts.

Shapes: P prompts.
"""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from scipy.stats import binomtest

from flow_rl.curation.scores import CuratedScores
from flow_rl.curation.selection import CategoryKeep, Selection
from flow_rl.evaluation.charts import Whisker, line_chart, nice_ticks, whisker_chart
from flow_rl.evaluation.curves import Curve
from flow_rl.evaluation.pages import environment
from flow_rl.files import put_text

#: quantiles of the ranges that programs are told
_SHARES = (0.1, 0.5, 0.9)
#: bins of a histogram
_BINS = 16
# One histogram, in units of its viewBox.
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 360.0, 170.0, 34.0, 22.0, 10.0


def console_table(selection: Selection) -> str:
    """Keep rate by category, one line each."""
    names = [*selection.categories, "all"]
    rows = [*selection.categories.values(), whole(selection)]
    width = max(len(name) for name in (*names, "category"))
    lines = [f"{'category':<{width}}  prompts   kept   rate  unscored  median range"]
    for name, row in zip(names, rows, strict=True):
        median = f"{np.quantile(row.ranges, 0.5):12.3f}" if row.ranges else f"{'-':>12}"
        lines.append(f"{name:<{width}}  {row.prompts:7d}{row.kept:7d}{row.rate:7.1%}{row.unscored:10d}  {median}")
    return f"Range of the composite above {selection.threshold:g}:\n" + "\n".join(lines)


def whole(selection: Selection) -> CategoryKeep:
    """All categories as one."""
    rows = selection.categories.values()
    return CategoryKeep(
        prompts=sum(row.prompts for row in rows),
        kept=sum(row.kept for row in rows),
        unscored=sum(row.unscored for row in rows),
        ranges=tuple(sorted(value for row in rows for value in row.ranges)),
    )


def write_report(scores: Path, curated: CuratedScores, selection: Selection) -> list[Path]:
    """Write `<scores>.json` and `<scores>.html` beside the scores; returns their paths.

    Raises:
        SettingError: one of them is there and was not written here, or was edited since.
    """
    data, page = report_files(scores)
    put_text(data, json.dumps(as_json(curated, selection), indent=1) + "\n")
    put_text(page, render(curated, selection))
    return [data, page]


def report_files(scores: Path) -> tuple[Path, Path]:
    """Paths of the report beside a file of scores: for programs, and for people."""
    return scores.with_name(f"{scores.stem}.json"), scores.with_name(f"{scores.stem}.html")


def as_json(curated: CuratedScores, selection: Selection) -> dict[str, Any]:
    """The report for programs."""
    top = histogram_top(selection)
    rows = selection.categories | {"all": whole(selection)}
    categories = {
        name: {
            "prompts": row.prompts,
            "kept": row.kept,
            "rate": row.rate,
            "unscored": row.unscored,
            "range": {f"p{round(100 * q)}": float(np.quantile(row.ranges, q)) for q in _SHARES} if row.ranges else None,
            "histogram": {"top": top, "counts": histogram(row.ranges, top)},
        }
        for name, row in rows.items()
    }
    return {
        "threshold": selection.threshold,
        "members": curated.scores.shape[1],
        "rewards": list(curated.reward_names),
        "all": categories.pop("all"),
        "categories": categories,
        "kept_ids": list(selection.kept),
    }


def histogram_top(selection: Selection) -> float:
    """Where the histograms end: the widest range, rounded up to a tenth."""
    widest = max((row.ranges[-1] for row in selection.categories.values() if row.ranges), default=0.0)
    return max(0.1, math.ceil(10 * widest) / 10)


def histogram(ranges: tuple[float, ...], top: float) -> list[int]:
    """Counts of ranges in equal bins from 0 to `top`."""
    counts = [0] * _BINS
    for value in ranges:
        counts[min(_BINS - 1, int(_BINS * value / top))] += 1
    return counts


def render(curated: CuratedScores, selection: Selection) -> str:
    """The page: keep rates, what other thresholds would keep, and histograms of the ranges."""
    everyone = whole(selection)
    categories = selection.categories | {"all": everyone}
    top = histogram_top(selection)
    thresholds = {name: Markup(line_chart(_kept_by_threshold(name, row, top))) for name, row in categories.items()}
    histograms = {
        name: Markup(histogram_chart(name, row.ranges, top, selection.threshold)) for name, row in categories.items()
    }
    rates = whisker_chart([_kept(name, row) for name, row in categories.items()], show=lambda value: f"{value:.0%}")
    lead = (
        f"{everyone.kept} of {everyone.prompts} prompts have images that the composite reward tells apart: its raw "
        f"range over {curated.scores.shape[1]} images of the base exceeds {selection.threshold:g}."
    )
    page = environment().get_template("curation.html.j2")
    return page.render(
        title="Which prompts to train on",
        summary=[lead],
        rates=Markup(rates),
        thresholds=thresholds,
        histograms=histograms,
    )


def _kept(name: str, row: CategoryKeep) -> Whisker:
    """The share of prompts that a category keeps, with Wilson's 95 % interval."""
    interval = binomtest(row.kept, row.prompts).proportion_ci(method="wilson")
    note = f"{row.kept} of {row.prompts}" + (f", {row.unscored} unscored" if row.unscored else "")
    low, high = float(interval.low), float(interval.high)
    return Whisker(label=name, mean=row.rate, low=low, high=high, tone="plain", note=note, strong=name == "all")


def _kept_by_threshold(name: str, row: CategoryKeep, top: float) -> Curve:
    positions = [top * i / 40 for i in range(41)]
    y = [sum(value > at for value in row.ranges) / row.prompts for at in positions]
    return Curve(name=name, x=positions, y=y, x_label="threshold", y_label="share kept")


def histogram_chart(name: str, ranges: tuple[float, ...], top: float, threshold: float) -> str:
    """Bars over the range, with a line at the threshold, as inline SVG."""
    counts = histogram(ranges, top)
    most = max(counts) or 1
    high, wide = _HEIGHT - _BOTTOM - _TOP, (_WIDTH - _LEFT) / _BINS
    bars = "".join(
        f'<rect fill="var(--accent)" x="{_LEFT + i * wide + 1:.1f}" width="{wide - 2:.1f}" '
        f'y="{_HEIGHT - _BOTTOM - high * count / most:.1f}" height="{high * count / most:.1f}"/>'
        for i, count in enumerate(counts)
    )

    def across(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT) * value / top

    ticks = "".join(
        f'<text x="{across(tick):.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{tick:g}</text>'
        for tick in nice_ticks(0.0, top, 4)
    )
    at = across(threshold)
    line = (
        f'<line class="reference" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{_HEIGHT - _BOTTOM}"/>' if at <= _WIDTH else ""
    )
    said = f"{name}: {len(ranges)} prompts, {sum(value > threshold for value in ranges)} above the threshold."
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" aria-label="{escape(said)}">'
        f'<text x="{_LEFT - 6}" y="{_TOP + 8}" text-anchor="end">{most}</text>{bars}{line}{ticks}</svg>'
    )
