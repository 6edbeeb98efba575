"""A 5 x 7 capital-letter bitmap font, and where the letters of a card go.

Shapes: H = W = 32 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

GLYPH_WIDTH, GLYPH_HEIGHT = 5, 7

_ROWS = {
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "B": "11110 10001 10001 11110 10001 10001 11110",
    "C": "01110 10001 10000 10000 10000 10001 01110",
    "D": "11110 10001 10001 10001 10001 10001 11110",
    "E": "11111 10000 10000 11110 10000 10000 11111",
    "F": "11111 10000 10000 11110 10000 10000 10000",
    "G": "01110 10001 10000 10011 10001 10001 01110",
    "H": "10001 10001 10001 11111 10001 10001 10001",
    "I": "11111 00100 00100 00100 00100 00100 11111",
    "J": "00111 00010 00010 00010 00010 10010 01100",
    "K": "10001 10010 10100 11000 10100 10010 10001",
    "L": "10000 10000 10000 10000 10000 10000 11111",
    "M": "10001 11011 10101 10101 10001 10001 10001",
    "N": "10001 11001 11001 10101 10011 10011 10001",
    "O": "01110 10001 10001 10001 10001 10001 01110",
    "P": "11110 10001 10001 11110 10000 10000 10000",
    "Q": "01110 10001 10001 10001 10101 10010 01101",
    "R": "11110 10001 10001 11110 10100 10010 10001",
    "S": "01111 10000 10000 01110 00001 00001 11110",
    "T": "11111 00100 00100 00100 00100 00100 00100",
    "U": "10001 10001 10001 10001 10001 10001 01110",
    "V": "10001 10001 10001 10001 10001 01010 00100",
    "W": "10001 10001 10001 10101 10101 11011 10001",
    "X": "10001 10001 01010 00100 01010 10001 10001",
    "Y": "10001 10001 01010 00100 00100 00100 00100",
    "Z": "11111 00001 00010 00100 01000 10000 11111",
}
GLYPHS: dict[str, np.ndarray] = {
    letter: np.array([[int(pixel) for pixel in row] for row in rows.split()], dtype=bool)
    for letter, rows in _ROWS.items()
}

# Letter boxes by the number of letters: (top, left, scale). A 2 x 2 grid keeps every stroke two pixels wide.
_TWO_ROWS = ((1, 5, 2), (1, 17, 2), (17, 5, 2), (17, 17, 2))
LAYOUT: dict[int, tuple[tuple[int, int, int], ...]] = {
    1: ((5, 8, 3),),
    2: ((9, 5, 2), (9, 17, 2)),
    3: _TWO_ROWS[:3],
    4: _TWO_ROWS,
}


def text_mask(text: str, size: int = 32) -> np.ndarray:
    """The ink of a card.

    Args:
        text: 1 to 4 capital letters, set in one row (1, 2) or in two rows of two (3, 4).
        size: width and height of the card in pixels.

    Returns:
        bool array (size, size), True where there is ink.

    Raises:
        ValueError: when the text is empty, too long, or has something else than A to Z in it.
    """
    if len(text) not in LAYOUT or any(letter not in GLYPHS for letter in text):
        raise ValueError(f"A card shows 1 to {max(LAYOUT)} letters A to Z, received {text!r}.")
    return place_letters(text, LAYOUT[len(text)], size)


def place_letters(text: str, boxes: Sequence[tuple[int, int, int]], size: int = 32) -> np.ndarray:
    """Ink of letters in boxes (top, left, scale), one a letter: bool (size, size)."""
    mask = np.zeros((size, size), dtype=bool)
    for letter, (top, left, scale) in zip(text, boxes, strict=True):
        glyph = np.kron(GLYPHS[letter], np.ones((scale, scale), dtype=bool))
        mask[top : top + glyph.shape[0], left : left + glyph.shape[1]] = glyph
    return mask
