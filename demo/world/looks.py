"""Who it is: the unnamed colour by which one tells that this is another person, or another plant.

Captions do not name it, and edits keep it. It is known of a render, and read off the pixels of any other image.

Shapes: H = W = 32.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from demo.world.world import Scene

#: renderer option that changes with the identity
IDENTITY_OPTION = {"portrait": "skinColor", "plant": "plantColor"}
#: its values; letters, which say no more than same or other, and are one token each
LOOKS = {
    "portrait": {"#f5d0b0": "A", "#dda878": "B", "#b07347": "C", "#6a3d1f": "D"},
    "plant": {"#34c759": "A", "#2ea44f": "B", "#7ed321": "C"},
}
#: where to look, (top, bottom, left, right): below the eyes and above the mouth; above the pot
_REGIONS = {"portrait": (16, 19, 6, 22), "plant": (2, 24, 4, 28)}


def look_of(scene: Scene) -> str:
    """The letter for a render's look; KeyError for a category that has none."""
    return LOOKS[scene.category][scene.options[IDENTITY_OPTION[scene.category]]]


def read_look(image: Tensor, category: str) -> str:
    """The look that an image shows: the colour that most pixels of the region are nearest to.

    Args:
        image: float32 in [0, 1], shape (3, H, W).
        category: `portrait` or `plant`.
    """
    top, bottom, left, right = _REGIONS[category]
    pixels = image[:, top:bottom, left:right].flatten(1).T.double().numpy()
    colors = np.array([[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in LOOKS[category]])
    squared = ((pixels[:, None] - colors) ** 2).sum(-1)
    votes = np.exp(-squared / (2 * 0.1**2)).sum(0)
    return list(LOOKS[category].values())[int(votes.argmax())]
