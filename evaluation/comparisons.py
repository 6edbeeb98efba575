"""The cards of a report that show what each model made of one prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from torch import Tensor

from evaluation.grids import to_data_uri
from evaluation.records import ComparisonRow, Report

_PIXELATED_SIDE = 128  # images up to this side are enlarged without blur
_HALF_WIDTH = 420  # cards of this width stand two in a row on a wide screen


def comparison_cards(report: Report) -> str:
    """One group of cards a category; empty without comparisons."""
    parts = []
    for grid in report.grids:
        if not grid.rows:
            continue
        width = max(310, 118 * max(_columns(row, report.models) for row in grid.rows))
        if len(grid.rows) % 2 == 0 and len(grid.rows) % 3:
            width = max(width, _HALF_WIDTH)  # two in a row, so that none is left alone
        cards = "".join(_card(row, report) for row in grid.rows)
        parts.append(f'<h3>{escape(grid.category)}</h3><div class="cards" style="--card-width:{width}px">{cards}</div>')
    if not parts:
        return ""
    lead = f"Each card is one prompt; the number under an image is its {report.score_name}."
    return f'<p class="lead">{escape(lead)}</p>{"".join(parts)}'


def _columns(row: ComparisonRow, models: Sequence[str]) -> int:
    return (row.source is not None) + sum(model in row.images for model in models)


def _card(row: ComparisonRow, report: Report) -> str:
    shots = [] if row.source is None else [_shot("source", row, [row.source], "")]
    reference = report.models[0]
    for model in report.models:
        if model not in row.images:
            continue
        images = row.images[model]
        caption = _score(row, model, report.score_format, None if model == reference else row.scores.get(reference))
        shots.append(_shot(model, row, [images] if isinstance(images, Tensor) else list(images), caption))
    look = "shots many" if len(shots) > 3 else "shots"
    return (
        f'<article class="card"><p class="prompt">{escape(row.prompt)}</p>'
        f'<div class="{look}" style="--shots:{len(shots)}">{"".join(shots)}</div></article>'
    )


def _shot(name: str, row: ComparisonRow, images: Sequence[Tensor], caption: str) -> str:
    across = math.ceil(math.sqrt(len(images)))
    tags = []
    for i, image in enumerate(images):
        number = f", sample {i + 1}" if len(images) > 1 else ""
        alt = escape(f"{name}{number}: {row.prompt}")
        height, width = image.shape[-2:]
        small = ' class="small"' if max(height, width) <= _PIXELATED_SIDE else ""
        tags.append(f'<img{small} src="{to_data_uri(image)}" alt="{alt}" width="{width}" height="{height}">')
    return (
        f'<figure><div class="images" style="--across:{across}">{"".join(tags)}</div>'
        f"<figcaption><span>{escape(name)}</span>{caption}</figcaption></figure>"
    )


def _score(row: ComparisonRow, model: str, score_format: str, reference: float | None) -> str:
    """The score of one model, coloured by whether it is better or worse than the reference's as printed."""
    score = row.scores.get(model, math.nan)
    if math.isnan(score):
        return "<span>not scored</span>"
    text, tone = format(score, score_format), ""
    if reference is not None and not math.isnan(reference) and text != format(reference, score_format):
        tone = ' class="up"' if score > reference else ' class="down"'
    return f"<b{tone}>{escape(text)}</b>"
