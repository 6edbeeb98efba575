"""The picture of a pipeline: boxes in rows with arrows, as inline SVG that a phone shows without shrinking its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

_WIDTH, _BOX_HEIGHT, _GAP, _BETWEEN = 360.0, 46.0, 8.0, 30.0
_WIDEST = 176.0


@dataclass(frozen=True, kw_only=True)
class Box:
    """One stage.

    Attributes:
        name: what arrows refer to, and the heading.
        note: a few words below it.
        row: boxes of one row stand side by side, rows from top to bottom.
        after: names of the boxes that arrows come from.
        baseline: drawn dashed: what the recipe is compared with, not a part of it.
    """

    name: str
    note: str
    row: int
    after: Sequence[str] = ()
    baseline: bool = False


def pipeline_picture(boxes: Sequence[Box]) -> str:
    """The picture; empty without boxes.

    Raises:
        ValueError: two boxes of one name, or an arrow from a box that is not there or not above.
    """
    if not boxes:
        return ""
    rows = {box.name: box.row for box in boxes}
    if len(rows) != len(boxes):
        raise ValueError(f"Boxes need different names; received {[box.name for box in boxes]}.")
    for box in boxes:
        for name in box.after:
            if rows.get(name, box.row) >= box.row:
                raise ValueError(f"The arrow to '{box.name}' comes from '{name}', which is no box in a row above.")
    places = _places(boxes)
    arrows = "".join(_arrow(places[name], places[box.name], box.baseline) for box in boxes for name in box.after)
    drawn = "".join(_box(box, *places[box.name]) for box in boxes)
    height = max(y for _, y, _ in places.values()) + _BOX_HEIGHT + 4
    said = "; ".join(f"{box.name} after {', '.join(box.after)}" if box.after else box.name for box in boxes)
    head = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="tip" d="M0,0.5 L8,4 L0,7.5 z"></path></marker></defs>'
    )
    return (
        f'<div class="panel"><svg class="pipeline" viewBox="0 0 {_WIDTH:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(said)}">{head}{arrows}{drawn}</svg></div>'
    )


_Place = tuple[float, float, float]  # left, top, width


def _places(boxes: Sequence[Box]) -> dict[str, _Place]:
    places: dict[str, _Place] = {}
    ordered = sorted(boxes, key=lambda box: box.row)
    for number, (_, found) in enumerate(groupby(ordered, key=lambda box: box.row)):
        row = list(found)
        width = min(_WIDEST, (_WIDTH - 4 - _GAP * (len(row) - 1)) / len(row))
        left = (_WIDTH - width * len(row) - _GAP * (len(row) - 1)) / 2
        for i, box in enumerate(row):
            places[box.name] = (left + i * (width + _GAP), 2 + number * (_BOX_HEIGHT + _BETWEEN), width)
    return places


def _box(box: Box, left: float, top: float, width: float) -> str:
    middle = left + width / 2
    look = "box baseline" if box.baseline else "box"
    return (
        f'<rect class="{look}" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{_BOX_HEIGHT}" rx="8"></rect>'
        f'<text class="name" x="{middle:.1f}" y="{top + 19:.1f}" text-anchor="middle">{escape(box.name)}</text>'
        f'<text x="{middle:.1f}" y="{top + 35:.1f}" text-anchor="middle">{escape(box.note)}</text>'
    )


def _arrow(start: _Place, end: _Place, dashed: bool) -> str:
    x1, y1 = start[0] + start[2] / 2, start[1] + _BOX_HEIGHT
    x2, y2 = end[0] + end[2] / 2, end[1] - 2
    bend = min(0.5 * (y2 - y1), 24)
    look = "arrow baseline" if dashed else "arrow"
    path = f"M{x1:.1f},{y1:.1f} C{x1:.1f},{y1 + bend:.1f} {x2:.1f},{y2 - bend:.1f} {x2:.1f},{y2:.1f}"
    return f'<path class="{look}" d="{path}" marker-end="url(#tip)"></path>'
