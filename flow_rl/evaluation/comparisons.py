"""What the cards of a report show: the images that each model made of one prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from flow_rl.evaluation.grids import to_data_uri
from flow_rl.evaluation.records import Comparison, ComparisonRow, Report

_PIXELATED_SIDE = 128  # images up to this side are enlarged without blur
_HALF_WIDTH = 420  # cards of this width stand two in a row on a wide screen


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image: `uri` holds its data, `small` asks for enlarging without blur; sides are in pixels."""

    uri: str
    alt: str
    width: int
    height: int
    small: bool


@dataclass(frozen=True, kw_only=True)
class Shot:
    """What one model made of a prompt.

    Attributes:
        name: of the model, or `source`.
        images: one or several samples.
        score: as printed; None where there is none.
        tone: `up` or `down` where the printed score is better or worse than the reference's; else empty.
    """

    name: str
    images: Sequence[Picture]
    score: str | None = None
    tone: str = ""

    @property
    def across(self) -> int:
        """How many of the images stand side by side."""
        return math.ceil(math.sqrt(len(self.images)))


def card_width(grid: Comparison, models: Sequence[str]) -> int:
    """Least width in pixels of the cards of a category."""
    width = max(310, 118 * max((row.source is not None) + sum(m in row.images for m in models) for row in grid.rows))
    if len(grid.rows) % 2 == 0 and len(grid.rows) % 3:
        return max(width, _HALF_WIDTH)  # two in a row, so that none is left alone
    return width


def shots(row: ComparisonRow, report: Report) -> list[Shot]:
    """The source, if any, and what every model made of a prompt. The first model is the reference of the tones."""
    found = [] if row.source is None else [Shot(name="source", images=_pictures("source", row, [row.source]))]
    for model in report.models:
        if model in row.images:
            images = row.images[model]
            pictures = _pictures(model, row, [images] if isinstance(images, Tensor) else list(images))
            score, tone = _score(row, model, report)
            found.append(Shot(name=model, images=pictures, score=score, tone=tone))
    return found


def _pictures(name: str, row: ComparisonRow, images: Sequence[Tensor]) -> list[Picture]:
    pictures = []
    for number, image in enumerate(images, start=1):
        sample = f", sample {number}" if len(images) > 1 else ""
        height, width = image.shape[-2:]
        small = max(height, width) <= _PIXELATED_SIDE
        alt = f"{name}{sample}: {row.prompt}"
        pictures.append(Picture(uri=to_data_uri(image), alt=alt, width=width, height=height, small=small))
    return pictures


def _score(row: ComparisonRow, model: str, report: Report) -> tuple[str | None, str]:
    """The printed score of a model, and its tone."""
    score, reference = (row.scores.get(name, math.nan) for name in (model, report.models[0]))
    if math.isnan(score):
        return None, ""
    text = format(score, report.score_format)
    if math.isnan(reference) or text == format(reference, report.score_format):
        return text, ""
    return text, "up" if score > reference else "down"
