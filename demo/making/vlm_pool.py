"""The pictures that the tiny vision-language model is pre-trained on: renders, cards, edits.

Shapes: N pictures, H = W = 32.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from demo.annotation.cases import edit_case
from demo.world.cache import cached_arrays
from demo.world.dataset import render_scenes
from demo.world.degrade import imitate_generator
from demo.world.edits import EditPair
from demo.world.font import GLYPH_HEIGHT, GLYPH_WIDTH, place_letters
from demo.world.looks import look_of
from demo.world.render import SIZE, print_card
from demo.world.world import WORLD_VERSION, Scene, Split, keyed_rng, make_scene, render
from flow_rl.models.images import from_uint8, to_uint8

#: a third as many cards again: there are 26 letters to learn, and only a fifth of the scenes shows any
_CARDS = 3
_LOOSE_STREAM = 43


@dataclass(frozen=True, kw_only=True)
class EditExample:
    """A rendered edit: source and result uint8 (32, 32, 3), the pair, and the result's attributes, look and flaws."""

    pair: EditPair
    source: np.ndarray
    result: np.ndarray
    attributes: dict[str, str]
    look: str
    broken: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Renders that batches are drawn from.

    Attributes:
        split: of all scenes.
        scenes: N of them.
        images: uint8 (N, 32, 32, 3).
        portraits: rows of `scenes` that are portraits.
        cards: rows of `scenes` that are cards.
        edits: rendered edits.
    """

    split: Split
    scenes: list[Scene]
    images: np.ndarray
    portraits: np.ndarray
    cards: np.ndarray
    edits: list[EditExample]


def load_pool(
    seed: int,
    scenes: int,
    edits: int,
    *,
    split: Split,
    cache_dir: Path | None,
    workers: int = 0,
    loose_cards: bool = False,
) -> Pool:
    """Render a pool, or read it.

    Args:
        seed: which stream of scenes.
        scenes: scenes of any category; a third as many cards are added.
        edits: edits, with three results each.
        split: of everything.
        cache_dir: keeps the pixels.
        workers: processes that render scenes; 0 renders here.
        loose_cards: half of the added cards have letters of other sizes in other places. A split's texts are its own,
            so that some letters never stand alone in it: this is how they are seen large all the same.
    """
    pixels, made = [], []
    for count, category in ((scenes, None), (scenes // _CARDS, "typography")):
        common = {"split": split, "category": category}
        data = render_scenes(seed, range(count), **common, workers=workers if count > 500 else 0, cache_dir=cache_dir)
        pixels.append(data.images)
        made += [make_scene(seed, index, **common) for index in range(count)]
    images, categories = np.concatenate(pixels), np.array([scene.category for scene in made])
    if loose_cards:
        for row in range(scenes, len(made), 2):
            images[row] = loose_card(made[row], keyed_rng(seed, row, _LOOSE_STREAM))
    return Pool(
        split=split,
        scenes=made,
        images=images,
        portraits=np.flatnonzero(categories == "portrait"),
        cards=np.flatnonzero(categories == "typography"),
        edits=_edit_pool(seed, edits, split, cache_dir),
    )


def _edit_pool(seed: int, count: int, split: Split, cache_dir: Path | None) -> list[EditExample]:
    cases = [edit_case(seed, index, split=split, members=3) for index in range(count)]
    key = hashlib.blake2b(repr((WORLD_VERSION, seed, count, split)).encode(), digest_size=12).hexdigest()
    path = None if cache_dir is None else cache_dir / f"edit-outcomes-{key}.npz"

    def draw() -> dict[str, np.ndarray]:
        rendered = [np.stack([render(s) for s in (pair.source, *(o.scene for o in made))]) for pair, made in cases]
        return {"images": np.stack(rendered)}

    pixels = cached_arrays(path, draw)["images"]
    return [
        EditExample(
            pair=pair,
            source=row[0],
            result=row[1 + i],
            attributes=made.scene.attributes,
            look=look_of(made.scene),
            broken=made.broken,
        )
        for (pair, outcomes), row in zip(cases, pixels, strict=True)
        for i, made in enumerate(outcomes)
    ]


def loose_card(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A card whose one or two letters are of drawn sizes in drawn places, uint8 (H, W, 3); longer texts as usual."""
    text = scene.options["text"]
    if len(text) > 2:
        return render(scene)
    scales = rng.permutation((2, 3))[: len(text)]
    free = SIZE - int(scales.sum()) * GLYPH_WIDTH - (len(text) - 1)  # one column between two letters
    boxes, left = [], 0
    for scale in scales.tolist():
        gap = int(rng.integers(free + 1))
        free, left = free - gap, left + gap
        boxes.append((int(rng.integers(SIZE - scale * GLYPH_HEIGHT + 1)), left, scale))
        left += scale * GLYPH_WIDTH + 1
    return print_card(place_letters(text, boxes, SIZE), scene.options)


def imitated(pixels: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Pictures as a generator might have made them: uint8 (N, H, W, 3) to uint8 (N, 3, H, W)."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    images = imitate_generator(from_uint8(pixels), generator)
    return torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2).contiguous()
