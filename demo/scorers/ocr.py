"""The demo world's letters behind the OCR reward: exact template matching, nothing trained.

Shapes: N images, C = 3, H = W = 32.
"""

from __future__ import annotations

from torch import Tensor

from demo.scorers.exact import read_cards
from demo.world.captions import parse
from demo.world.vocabulary import LETTERS
from flow_rl.rewards.ocr import OCRReader


class CardReader(OCRReader):
    """Reads typography cards; an image of anything else reads as whatever its shapes resemble, mostly nothing."""

    def read(self, images: Tensor) -> list[str]:
        """The letters of cards (N, 3, 32, 32) in [0, 1]; a place more likely empty than any letter is left out."""
        card = read_cards(images)
        texts = []
        for row in range(len(images)):
            places = card.letters[int(card.layouts[row].argmax()) + 1][row]
            shown = places.amax(-1) > 1 - places.sum(-1)
            texts.append("".join(LETTERS[int(place.argmax())] for place in places[shown]))
        return texts


def requested_letters(prompt: str) -> str | None:
    """The letters that a caption of the demo world asks for; None when it asks for none or is no such caption."""
    try:
        return parse(prompt).attributes.get("text")
    except ValueError:
        return None
