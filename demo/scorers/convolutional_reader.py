"""The eyes of annotator and monitor: a small convolutional network, and exact checks of flat colours and letters.

Shapes: N images, C = 3, H = W = 32.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from typing_extensions import override

from demo.scorers.convolutional import convolution, stages
from demo.scorers.exact import FLAT, Card, flat_color, read_cards
from demo.scorers.readings import Reading
from demo.scorers.verifiers import Verifier
from demo.world.render import palette
from demo.world.vocabulary import ATTRIBUTES, CATEGORIES


def _heads() -> dict[tuple[str, str], tuple[str, ...]]:
    """The attributes that trained heads read; "none" is added where an attribute need not exist."""
    heads = {}
    for category in CATEGORIES:
        for attribute in ATTRIBUTES[category]:
            if category != "typography" and attribute.name != FLAT[category][0]:
                heads[category, attribute.name] = attribute.values + (("none",) if attribute.when else ())
    return heads


HEADS = _heads()


class ConvolutionalReader(Verifier):
    """Annotator and monitor: a small convolutional network; flat colours and letters are measured exactly.

    Args:
        width: channels of the first convolution.
    """

    def __init__(self, *, width: int) -> None:
        super().__init__()
        w = width
        layers: list[nn.Module] = []
        for channels_in, channels_out in stages(w):
            layers += convolution(channels_in, channels_out)
            if channels_out != 3 * w or channels_in != 3 * w:
                layers.append(nn.MaxPool2d(2))
        layers += [nn.Flatten(), nn.Dropout(0.2), nn.Linear(3 * w * 16, 160), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.Linear(160, sum(len(values) for values in HEADS.values()))

    def forward(self, images: Tensor) -> dict[tuple[str, str], Tensor]:
        """Logits of every head, (N, values), for images (N, 3, 32, 32) in [0, 1]."""
        logits = self.heads(self.trunk((images - 0.5) * 4))
        sizes = [len(values) for values in HEADS.values()]
        return dict(zip(HEADS, logits.split(sizes, dim=1), strict=True))

    @override
    def read_category(self, images: Tensor, category: str) -> list[Reading]:
        flat = FLAT[category][0]
        tables = {flat: (tuple(palette(category, flat)), flat_color(images, category))}
        card = None
        if category == "typography":
            card = read_cards(images)
            tables["ink"] = (tuple(palette(category, "ink")), card.ink)
        else:
            logits = self(images)
            for (head_category, name), values in HEADS.items():
                if head_category == category:
                    tables[name] = (values, logits[category, name].softmax(-1))
        return [
            Reading(
                tables={name: (values, table[row].tolist()) for name, (values, table) in tables.items()},
                letters=None if card is None else _CardLetters(card=card, row=row),
            )
            for row in range(len(images))
        ]


@dataclass(frozen=True, kw_only=True)
class _CardLetters:
    card: Card
    row: int

    def text(self) -> str:
        return self.card.text(self.row)

    def text_probability(self, text: str) -> float:
        return self.card.text_probability(self.row, text)
