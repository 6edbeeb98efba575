"""Known damage of pictures: kinds, each in four grades that one can tell apart.

Whole pictures take any of the corruptions of `demo.world.degrade`; faces take some of these, and parts that are
missing, bent or out of place.

Shapes: C = 3, H = W = 32. Images are float32 in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Generator, Tensor

from demo.world.degrade import CORRUPTIONS, warp

GRADES = 4
#: word for a kind -> its corruption in `demo.world.degrade`
PICTURE_DAMAGE = {
    "blur": "blur",
    "noise": "noise",
    "coarse": "low_resolution",
    "blocks": "quantize",
    "colors": "palette",
    "broken": "patches",
    "bent": "warp",
}
# Where a portrait's face is: (top, bottom, left, right) in pixels.
_FACE = (11, 24, 5, 22)
_MOUTH = (18, 22, 8, 18)
_EYE = (13, 18, 5, 13)
_EYES = (13, 18, 5, 22)


def _corrupted(name: str, image: Tensor, grade: int, generator: Generator) -> Tensor:
    return CORRUPTIONS[name](image[None], torch.tensor([grade / GRADES]), generator)[0]


def _missing(image: Tensor, grade: int, _generator: Generator) -> Tensor:
    """The mouth, an eye, both eyes or the whole face is painted over with the face's own colour."""
    top, bottom, left, right = (_MOUTH, _EYE, _EYES, _FACE)[grade - 1]
    face = image[:, _FACE[0] : _FACE[1], _FACE[2] : _FACE[3]].flatten(1)
    out = image.clone()
    out[:, top:bottom, left:right] = face.median(dim=1).values[:, None, None]
    return out


def _twisted(image: Tensor, grade: int, generator: Generator) -> Tensor:
    """The face is bent, the rest is not."""
    top, bottom, left, right = _FACE
    bent = warp(image[None], torch.tensor([0.25 + 0.75 * grade / GRADES]), generator)[0]
    out = image.clone()
    out[:, top:bottom, left:right] = bent[:, top:bottom, left:right]
    return out


def _split(image: Tensor, grade: int, _generator: Generator) -> Tensor:
    """The head below the eyes is moved to the side by 2 to 8 pixels."""
    out = image.clone()
    out[:, 17:25] = image[:, 17:25].roll(2 * grade, dims=2)
    return out


Damage = Callable[[Tensor, int, Generator], Tensor]
PICTURE: dict[str, Damage] = {word: partial(_corrupted, name) for word, name in PICTURE_DAMAGE.items()}
FACE: dict[str, Damage] = {
    "parts": _missing,
    "twisted": _twisted,
    "split": _split,
    **{word: PICTURE[word] for word in ("blur", "noise", "broken")},
}


def damage(image: Tensor, kinds: dict[str, Damage], grade: int, rng: np.random.Generator) -> tuple[Tensor, list[str]]:
    """Damage a picture by a known amount.

    Args:
        image: (3, 32, 32).
        kinds: to choose from, `PICTURE` or `FACE`.
        grade: 0 (unchanged) to 4; now and then it is shared by two kinds.
        rng: decides everything else.

    Returns:
        the picture, clamped to [0, 1], and the kinds in the order of `kinds`.
    """
    if not 0 <= grade <= GRADES:
        raise ValueError(f"grade is {grade}; it is 0 (no damage) to {GRADES}.")
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    shares = [grade] if grade else []
    if grade >= 2 and rng.random() < 0.25:
        first = int(rng.integers(1, grade))
        shares = [first, grade - first]
    chosen = rng.permutation(list(kinds))[: len(shares)].tolist()
    for kind, share in zip(chosen, shares, strict=True):
        image = kinds[kind](image, share, generator).clamp(0, 1)
    return image, [kind for kind in kinds if kind in chosen]
