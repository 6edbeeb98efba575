"""Exact checks: flat colours by the nearest palette colour, letters by template matching.

Nothing here is trained, so annotator and monitor share it. The judge reads with networks alone. Each check gives a
probability to every value it knows: a smooth function of the pixels, 1 for a clean render of the value.

Shapes: N images, C = 3, H = W = 32, K palette colours, L letters (26), B letter boxes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from demo.world import font
from demo.world.render import palette
from demo.world.vocabulary import LETTERS, MAX_LETTERS

_COLOR_WIDTH = 0.1  # standard deviation of "the same colour", in RGB distance; palettes are 0.3 and more apart
_NO_COLOR = 0.3  # at this distance from every palette colour, none of them is more likely than none
_LETTER_TEMPERATURE = 0.03  # in units of correlation: E and F correlate by about 0.9
_NO_LETTER = 0.4  # a box that correlates less than this with every letter shows none
_LAYOUT_TEMPERATURE = 0.05
_MAX_SHIFT = 2  # pixels that a letter may be away from its place
_INK_PIXELS = 40  # the thinnest text (one I) has 99 pixels of ink

# The attribute that is one flat colour behind everything, and rectangles (top, bottom, left, right) where
# nothing else is ever drawn.
FLAT: dict[str, tuple[str, tuple[tuple[int, int, int, int], ...]]] = {
    "portrait": ("background", ((2, 24, 0, 3), (2, 24, 28, 32))),
    "plant": ("background", ((0, 32, 0, 6), (0, 32, 26, 32))),
    "creature": ("background", ((0, 9, 0, 7), (0, 9, 25, 32))),
    "landscape": ("sky", ((1, 6, 0, 3), (1, 6, 10, 12), (1, 6, 18, 20), (1, 6, 29, 32))),
    "typography": ("card", ((0, 32, 0, 4), (0, 32, 28, 32))),
}


def _rgb(colors: dict[str, str]) -> Tensor:
    return torch.tensor([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in colors.values()])


@cache
def _palette_KC(category: str, attribute: str) -> Tensor:
    return _rgb(palette(category, attribute))


def _nearest(colors: Tensor, palette_KC: Tensor) -> Tensor:
    """Probabilities (..., K) of the palette's colours at colours (..., C); little for all off the palette."""
    squared = (colors[..., None, :] - palette_KC).square().sum(-1)
    nothing = squared.new_full((*squared.shape[:-1], 1), _NO_COLOR**2)
    logits = -torch.cat([squared, nothing], dim=-1) / (2 * _COLOR_WIDTH**2)
    return logits.softmax(-1)[..., :-1]


def _region(images: Tensor, category: str) -> Tensor:
    """Pixels (N, pixels, C) of the flat region."""
    boxes = FLAT[category][1]
    return torch.cat([images[:, :, t:b, x:y].flatten(2) for t, b, x, y in boxes], dim=2).transpose(1, 2)


def flat_color(images: Tensor, category: str) -> Tensor:
    """Probabilities (N, K) of the category's flat colour: the share of the region's pixels that have it."""
    attribute = FLAT[category][0]
    return _nearest(_region(images, category), _palette_KC(category, attribute)).mean(dim=1)


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a batch of cards shows.

    Attributes:
        ink: probabilities of the ink colours, (N, K).
        layouts: probabilities of 1, 2, 3, 4 letters, (N, 4).
        letters: for each number of letters n, probabilities (N, n, 26); they sum to less than 1 in an
            empty box.
    """

    ink: Tensor
    layouts: Tensor
    letters: dict[int, Tensor]

    def text(self, row: int) -> str:
        """The most likely text of one card."""
        count = int(self.layouts[row].argmax()) + 1
        return "".join(LETTERS[int(i)] for i in self.letters[count][row].argmax(-1))

    def text_probability(self, row: int, text: str) -> float:
        """Mean probability of the text's letters at their places, times that of their number."""
        letters = self.letters[len(text)][row]
        each = letters[torch.arange(len(text)), [LETTERS.index(letter) for letter in text]]
        return float(each.mean() * self.layouts[row, len(text) - 1])


def read_cards(images: Tensor) -> Card:
    """Read typography cards: float32 (N, 3, 32, 32) in [0, 1]."""
    card_NC = _region(images, "typography").median(dim=1).values
    offset = images - card_NC[:, :, None, None]
    farthest = offset.square().sum(1).flatten(1).topk(_INK_PIXELS, dim=1).indices
    ink_NC = images.flatten(2).gather(2, farthest[:, None].expand(-1, 3, -1)).mean(-1)
    axis = ink_NC - card_NC
    # How much ink each pixel has: 0 on the card's colour, 1 on the ink's.
    coverage = torch.einsum("nchw,nc->nhw", offset, axis) / axis.square().sum(1).clamp(min=1e-3)[:, None, None]
    coverage = coverage.clamp(0, 1)
    correlations = {
        count: torch.stack([_correlate(coverage, box) for box in boxes], dim=1) for count, boxes in font.LAYOUT.items()
    }
    letters = {count: _letter_probabilities(found) for count, found in correlations.items()}
    fits = torch.stack([_fit(coverage, found.argmax(-1), count) for count, found in correlations.items()], dim=1)
    return Card(
        ink=_nearest(ink_NC, _palette_KC("typography", "ink")),
        layouts=(fits / _LAYOUT_TEMPERATURE).softmax(1),
        letters=letters,
    )


def _letter_probabilities(correlation_NBL: Tensor) -> Tensor:
    nothing = correlation_NBL.new_full((*correlation_NBL.shape[:-1], 1), _NO_LETTER)
    return (torch.cat([correlation_NBL, nothing], -1) / _LETTER_TEMPERATURE).softmax(-1)[..., :-1]


@cache
def _templates(scale: int) -> Tensor:
    """Glyphs with a margin of one pixel, zero mean, unit norm: (L, height * width)."""
    glyphs = [np.pad(np.kron(font.GLYPHS[c], np.ones((scale, scale))), 1).ravel() for c in LETTERS]
    return _normalise(torch.tensor(np.stack(glyphs), dtype=torch.float32), floor=1e-6)


def _normalise(x: Tensor, floor: float) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / x.norm(dim=-1, keepdim=True).clamp(min=floor)


def _correlate(coverage: Tensor, box: tuple[int, int, int]) -> Tensor:
    """Best correlation of each letter with a box over small shifts: (N, L)."""
    top, left, scale = box
    height, width = font.GLYPH_HEIGHT * scale + 2, font.GLYPH_WIDTH * scale + 2
    padded = F.pad(coverage[:, None], (_MAX_SHIFT,) * 4, mode="replicate")[:, 0]
    first_row, first_column = top - 1, left - 1  # of the window that is shifted by -_MAX_SHIFT
    windows = [
        padded[:, first_row + dy : first_row + dy + height, first_column + dx : first_column + dx + width].flatten(1)
        for dy in range(2 * _MAX_SHIFT + 1)
        for dx in range(2 * _MAX_SHIFT + 1)
    ]
    # The floor keeps the noise of an empty box from looking like a faint letter.
    return (_normalise(torch.stack(windows, dim=1), floor=2.0) @ _templates(scale).T).amax(dim=1)


@cache
def _masks(count: int) -> Tensor:
    """Each letter at each place of a layout: (B, L, H, W)."""
    masks = torch.zeros(count, len(LETTERS), 32, 32)
    for place, (top, left, scale) in enumerate(font.LAYOUT[count]):
        for index, letter in enumerate(LETTERS):
            glyph = torch.tensor(np.kron(font.GLYPHS[letter], np.ones((scale, scale))), dtype=torch.float32)
            masks[place, index, top : top + glyph.shape[0], left : left + glyph.shape[1]] = glyph
    return masks


def _fit(coverage: Tensor, best_NB: Tensor, count: int) -> Tensor:
    """Correlation (N,) of the whole card with a layout's best letters; blurred, to forgive small shifts."""
    mask = _masks(count)[torch.arange(count), best_NB].sum(1)
    shown, expected = (_soften(x).flatten(1) for x in (coverage, mask))
    return (_normalise(shown, floor=2.0) * _normalise(expected, floor=1e-6)).sum(1)


def _soften(x_NHW: Tensor) -> Tensor:
    for _ in range(2):
        x_NHW = F.avg_pool2d(x_NHW[:, None], 3, stride=1, padding=1)[:, 0]
    return x_NHW


assert set(font.LAYOUT) == set(range(1, MAX_LETTERS + 1))
