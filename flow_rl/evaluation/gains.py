"""Gains over a reference: how they are written, coloured and drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flow_rl.evaluation.charts import Whisker, whisker_chart
from flow_rl.evaluation.statistics import Interval

#: the row of a table that is shown first and as a headline
OVERALL = "overall"


def gain_chart(gains: Mapping[str, Interval], score_format: str) -> str:
    """Dots and whiskers, `overall` first.

    Args:
        gains: gain by category.
        score_format: of the scores that the gains are differences of.
    """
    # A stable sort on one flag: only `overall` moves, to the front.
    names = sorted(gains, key=lambda name: name != OVERALL)
    rows = [_row(name, gains[name]) for name in names]
    return whisker_chart(rows, show=signed(score_format), show_tick=_signed_tick(score_format), reference=0.0)


def tone(gain: Interval) -> str:
    """`up` or `down` where the interval excludes zero, else `flat`."""
    if gain.low > 0:
        return "up"
    return "down" if gain.high < 0 else "flat"


def signed(score_format: str) -> Callable[[float], str]:
    """Format of differences; those of percentages are percentage points and carry no sign of percent."""
    percent = score_format.endswith("%")
    factor, number = (100.0, f"+{score_format[:-1]}f") if percent else (1.0, f"+{score_format}")
    # A typographic minus is as wide as the plus, so columns of gains line up.
    return lambda value: format(factor * value, number).replace("-", "−")


def _signed_tick(score_format: str) -> Callable[[float], str]:
    factor = 100.0 if score_format.endswith("%") else 1.0
    return lambda value: f"{factor * value:+.6g}".replace("-", "−") if value else "0"


def _row(name: str, gain: Interval) -> Whisker:
    return Whisker(
        label=name,
        note=f"n = {gain.n}",
        mean=gain.mean,
        low=gain.low,
        high=gain.high,
        tone=tone(gain),
        strong=name == OVERALL,
    )
