"""The judge's eyes: a residual network with a head for each attribute, and a network that reads letters.

It shares no reading code with annotator and monitor, which measure letters and flat colours exactly and read the rest
with another network: what fools those need not fool it. Its training is its own as well (`demo.making.train_judge`).

Shapes: N images, C = 3, H = W = 32, L = 26 letters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from demo.scorers.judge_letters import LetterNet, places
from demo.scorers.readings import Reading
from demo.scorers.residual import residual_trunk
from demo.scorers.verifiers import Verifier
from demo.world.font import LAYOUT
from demo.world.vocabulary import ATTRIBUTES, CATEGORIES, LETTERS

#: how many letters a card has; not an attribute that can be asked for, but a text has it
LETTER_COUNT = "letter_count"
_HIDDEN, _LETTER_WIDTH = 192, 24


def _slots() -> dict[tuple[str, str], tuple[str, ...]]:
    """(category, attribute) to its values; of a text, how many letters it has."""
    slots = {}
    for category in CATEGORIES:
        for attribute in ATTRIBUTES[category]:
            if attribute.name == "text":
                slots[category, LETTER_COUNT] = tuple(str(count) for count in LAYOUT)
            else:
                slots[category, attribute.name] = attribute.values + (("none",) if attribute.when else ())
    return slots


SLOTS = _slots()


@dataclass(frozen=True, kw_only=True)
class LetterReading:
    """The letters of one image.

    Attributes:
        counts: probabilities of 1, 2, 3, 4 letters, (4,).
        letters: of each count n, probabilities (n, L + 1) of each letter or none at its places.
    """

    counts: Tensor
    letters: dict[int, Tensor]

    def text(self) -> str:
        """The likeliest letters at the places of the likeliest layout; empty places are left out."""
        indices = self.letters[int(self.counts.argmax()) + 1].argmax(-1).tolist()
        return "".join(LETTERS[index] for index in indices if index < len(LETTERS))

    def text_probability(self, text: str) -> float:
        """Mean probability of the text's letters at their places, times that of their number."""
        wanted = torch.tensor([LETTERS.index(letter) for letter in text])
        each = self.letters[len(text)][torch.arange(len(text)), wanted]
        return float(each.mean() * self.counts[len(text) - 1])


class JudgeReader(Verifier):
    """Reads attributes and the number of letters by one network with a head a slot, and letters by another.

    Args:
        width: channels at half resolution.
    """

    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            residual_trunk(width), nn.Flatten(), nn.Linear(2 * width * 16, _HIDDEN), nn.LayerNorm(_HIDDEN), nn.SiLU()
        )
        self.heads = nn.ModuleList(nn.Linear(_HIDDEN, len(values)) for values in SLOTS.values())
        self.letters = LetterNet(width=_LETTER_WIDTH)

    def forward(self, images: Tensor) -> dict[tuple[str, str], Tensor]:
        """Logits of every slot, (N, values), for images (N, 3, 32, 32) in [0, 1]."""
        found = self.trunk(images * 2 - 1)
        return {slot: head(found) for slot, head in zip(SLOTS, self.heads, strict=True)}

    @override
    def read_category(self, images: Tensor, category: str) -> list[Reading]:
        logits = self(images)
        tables = {name: (v, logits[c, name].softmax(-1)) for (c, name), v in SLOTS.items() if c == category}
        letters: list[LetterReading | None] = [None] * len(images)
        if LETTER_COUNT in tables:
            counts = tables.pop(LETTER_COUNT)[1]
            found = {count: self.letters(places(images, count)).softmax(-1) for count in LAYOUT}
            letters = [
                LetterReading(counts=counts[row], letters={count: each[row] for count, each in found.items()})
                for row in range(len(images))
            ]
        return [
            Reading(
                tables={name: (values, table[row].tolist()) for name, (values, table) in tables.items()},
                letters=letters[row],
            )
            for row in range(len(images))
        ]
