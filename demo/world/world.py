"""Scenes of the demo world: drawn from (seed, index), split by attribute combination, rendered.

Everything is a pure function of its integer arguments, on every machine: random numbers come from numpy's
generators keyed by them, the split from a cryptographic hash.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from demo.world.render import draw_options, render_options
from demo.world.vocabulary import ATTRIBUTES, CATEGORIES, LETTERS, MAX_LETTERS, allowed
from flow_rl.suggestions import nearest

__all__ = [
    "CATEGORIES",
    "WORLD_VERSION",
    "Scene",
    "Split",
    "attribute_values",
    "key_attributes",
    "make_scene",
    "render",
    "split_of",
]

WORLD_VERSION = "1"
Split = Literal["train", "validation", "test"]
SPLITS: tuple[str, ...] = get_args(Split)
_LENGTH_PROBABILITIES = (0.35, 0.35, 0.15, 0.15)
_MAX_DRAWS = 10_000


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One picture before it is drawn.

    Attributes:
        category: one of ``CATEGORIES``.
        attributes: the nameable true attributes, name -> value; "none" for a thing that is absent.
        options: complete renderer options, those of unnamed details included.
    """

    category: str
    attributes: dict[str, str]
    options: dict[str, Any]


def check_category(category: str) -> str:
    """Return ``category``, or raise ValueError with the nearest match."""
    if category not in CATEGORIES:
        hint = nearest(str(category), CATEGORIES)
        raise ValueError(f"Unknown category {category!r}, expected one of {list(CATEGORIES)}.{hint}")
    return category


def check_split(split: str) -> str:
    """Return ``split``, or raise ValueError with the nearest match."""
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}, expected one of {list(SPLITS)}.{nearest(str(split), SPLITS)}")
    return split


def attribute_values(category: str) -> dict[str, tuple[str, ...]]:
    """All values of each attribute of a category; empty for typography's ``text`` (1 to 4 letters)."""
    return {attribute.name: attribute.values for attribute in ATTRIBUTES[check_category(category)]}


def key_attributes(category: str) -> tuple[str, ...]:
    """Names of the attributes whose combination decides the split."""
    return tuple(attribute.name for attribute in ATTRIBUTES[check_category(category)] if attribute.key)


def split_of(category: str, attributes: dict[str, str]) -> Split:
    """The split that a combination of key attributes belongs to: 8 of 10 train, 1 validation, 1 test."""
    key = "|".join(f"{name}={attributes.get(name, '-')}" for name in key_attributes(category))
    digest = hashlib.blake2b(f"{category}|{key}".encode(), digest_size=8).digest()
    bucket = int.from_bytes(digest, "big") % 10
    return "train" if bucket < 8 else "validation" if bucket == 8 else "test"


def keyed_rng(*key: int) -> np.random.Generator:
    """A generator that is a pure function of non-negative integers."""
    if any(part < 0 for part in key):
        raise ValueError(f"Seeds and indices must not be negative, received {key}.")
    return np.random.default_rng(np.random.SeedSequence(key))


def make_scene(seed: int, index: int, *, split: Split, category: str | None = None) -> Scene:
    """Draw one scene.

    Args:
        seed: which stream of scenes.
        index: which scene of the stream.
        split: the scene's combination of key attributes belongs to this split.
        category: None draws one uniformly.

    Raises:
        ValueError: for an unknown split or category, or a negative seed or index.
    """
    stream = SPLITS.index(check_split(split))
    rng = keyed_rng(seed, index, stream, 0 if category is None else 1 + CATEGORIES.index(check_category(category)))
    category = category or CATEGORIES[rng.integers(len(CATEGORIES))]
    for _ in range(_MAX_DRAWS):
        attributes = _draw_attributes(category, rng)
        if allowed(category, attributes) and split_of(category, attributes) == split:
            return Scene(category=category, attributes=attributes, options=draw_options(category, attributes, rng))
    raise AssertionError(f"No {category} of split {split} in {_MAX_DRAWS} draws: the vocabulary is too small.")


def render(scene: Scene) -> np.ndarray:
    """Pixels of a scene: uint8 (32, 32, 3), RGB."""
    return render_options(scene.category, scene.options)


def _draw_attributes(category: str, rng: np.random.Generator) -> dict[str, str]:
    drawn: dict[str, str] = {}
    for attribute in ATTRIBUTES[category]:
        if attribute.name == "text":
            length = 1 + int(rng.choice(MAX_LETTERS, p=_LENGTH_PROBABILITIES))
            drawn["text"] = "".join(rng.choice(list(LETTERS), size=length))
        elif attribute.exists(drawn):
            drawn[attribute.name] = attribute.values[rng.integers(len(attribute.values))]
    return drawn
