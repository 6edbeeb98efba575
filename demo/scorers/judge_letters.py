"""How the judge reads letters: a small network looks at one place of a card at a time.

Annotator and monitor compare a card with templates of the font (`demo.scorers.exact`). This reader knows only where
letters may stand, and has learnt from damaged cards what they look like.

Shapes: N cards, B places of a layout, L = 26 letters, C = 3, H = W = 32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from demo.world.font import GLYPH_HEIGHT, GLYPH_WIDTH, LAYOUT
from demo.world.vocabulary import LETTERS

#: class of a place that shows no letter
NO_LETTER = len(LETTERS)
_MARGIN = 0.25  # of a glyph's size, on each side: a generator does not place letters to the pixel
_LOOK = (20, 16)  # what every place is resampled to: height, width


def places(images: Tensor, count: int) -> Tensor:
    """What stands at each place of the layout for `count` letters: (N, B, 3, 20, 16)."""
    looks = []
    for top, left, scale in LAYOUT[count]:
        height, width = GLYPH_HEIGHT * scale, GLYPH_WIDTH * scale
        y, x = round(height * _MARGIN), round(width * _MARGIN)
        padded = F.pad(images, (x, x, y, y), mode="replicate")
        crop = padded[:, :, top : top + height + 2 * y, left : left + width + 2 * x]
        looks.append(F.interpolate(crop, size=_LOOK, mode="bilinear", align_corners=False))
    return torch.stack(looks, dim=1)


class LetterNet(nn.Module):
    """Which letter a place shows, or that it shows none.

    Args:
        width: channels of the first convolution.
    """

    def __init__(self, *, width: int) -> None:
        super().__init__()
        w = width
        self.layers = nn.Sequential(
            nn.Conv2d(3, w, 3, padding=1), nn.BatchNorm2d(w), nn.SiLU(),
            nn.Conv2d(w, 2 * w, 4, stride=2, padding=1), nn.BatchNorm2d(2 * w), nn.SiLU(),
            nn.Conv2d(2 * w, 2 * w, 4, stride=2, padding=1), nn.BatchNorm2d(2 * w), nn.SiLU(),
            nn.Flatten(), nn.Linear(2 * w * 5 * 4, 96), nn.SiLU(), nn.Linear(96, len(LETTERS) + 1),
        )  # fmt: skip

    def forward(self, looks: Tensor) -> Tensor:
        """Logits (..., L + 1) of looks (..., 3, 20, 16) with values in [0, 1].

        Colours are taken relative to the look's own mean and spread: a letter is a shape.
        """
        flat = looks.flatten(0, -4)
        mean = flat.mean((2, 3), keepdim=True)
        spread = (flat - mean).square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=0.02)
        return self.layers((flat - mean) / spread).unflatten(0, looks.shape[:-3])
