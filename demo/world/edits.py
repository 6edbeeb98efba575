"""Edit pairs with an exact target: one named attribute changes, every other pixel decision is replayed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches

import numpy as np

from demo.world import vocabulary as v
from demo.world.render import attribute_options
from demo.world.vocabulary import ATTRIBUTES, allowed
from demo.world.world import Scene, Split, attribute_values, keyed_rng, make_scene, split_of

EDITABLE = {
    "portrait": ("glasses", "beard", "hair", "hair_color", "shirt", "background"),
    "plant": ("pot", "bloom", "background"),
}
_EDIT_STREAM = 13
_MAX_SOURCES = 1000

_INSTRUCTIONS: dict[tuple[str, str | None], tuple[str, ...]] = {
    ("glasses", None): ("give the person {}", "put {} on the person", "change the glasses to {}"),
    ("glasses", "none"): ("remove the glasses", "take off the glasses"),
    ("beard", None): ("give the person {}", "add {}", "change the beard to {}"),
    ("beard", "none"): ("shave the beard off", "remove the beard"),
    ("hair", None): ("change the hairstyle to {}", "give the person {}", "make the hairstyle {}"),
    ("hair_color", None): ("make the hair {}", "change the hair color to {}", "dye the hair {}"),
    ("shirt", None): ("make the shirt {}", "change the shirt to {}", "give the person a {} shirt"),
    ("background", None): ("make the background {}", "change the background to {}", "use a {} background"),
    ("pot", None): ("make the pot {}", "change the pot to {}", "paint the pot {}"),
    ("bloom", None): ("make the bloom {}", "change the bloom to {}", "turn the bloom {}"),
}
_WORDS = {
    ("glasses", "round"): "round glasses",
    ("glasses", "sunglasses"): "sunglasses",
    ("glasses", "visor"): "a visor",
    ("beard", "full"): "a full beard",
    ("beard", "mustache"): "a mustache",
    ("hair", "short"): "short hair",
    ("hair", "spiky"): "spiky hair",
    ("hair", "long"): "long hair",
    ("hair", "mohawk"): "a mohawk",
    ("hair", "buns"): "hair buns",
}


@dataclass(frozen=True, kw_only=True)
class EditPair:
    """A source scene, an instruction, and the exact result of following it.

    Attributes:
        source: the scene before.
        target: the scene after: the same options but for those of ``attribute``.
        instruction: what to do, in English.
        category: category of both scenes.
        attribute: the one attribute that changes.
        value: its value in the target.
    """

    source: Scene
    target: Scene
    instruction: str
    category: str
    attribute: str
    value: str


def make_edit(seed: int, index: int, *, split: Split, category: str | None = None) -> EditPair:
    """Draw one edit pair; source and target both belong to the split.

    Args:
        seed: which stream of pairs.
        index: which pair of the stream.
        split: the combinations of both scenes belong to this split.
        category: a category that can be edited; None draws one.

    Raises:
        ValueError: for a category without edits, an unknown split, or a negative seed or index.
    """
    rng = keyed_rng(seed, index, _EDIT_STREAM)
    if category is None:
        category = str(rng.choice(list(EDITABLE)))
    if category not in EDITABLE:
        raise ValueError(f"No edits for category {category!r}: choose one of {list(EDITABLE)}.")
    for _ in range(_MAX_SOURCES):
        attribute = str(rng.choice(EDITABLE[category]))
        source = make_scene(seed, int(rng.integers(2**40)), split=split, category=category)
        values = [
            value
            for value in attribute_values(category)[attribute]
            if is_edit(source, attribute, value) and split_of(category, _changed(source, attribute, value)) == split
        ]
        if values:
            value = str(rng.choice(values))
            return EditPair(
                source=source,
                target=apply_edit(source, attribute, value),
                instruction=instruction(attribute, value, rng),
                category=category,
                attribute=attribute,
                value=value,
            )
    raise AssertionError(f"No edit of a {category} in split {split}: the vocabulary is too small.")


def is_edit(scene: Scene, attribute: str, value: str) -> bool:
    """Whether setting the attribute changes exactly that one attribute, visibly, of a scene."""
    if attribute not in scene.attributes or scene.attributes[attribute] == value or value == "bald":
        return False
    changed = _changed(scene, attribute, value)
    same_attributes = all(a.exists(changed) == (a.name in changed) for a in ATTRIBUTES[scene.category])
    return same_attributes and allowed(scene.category, changed)


def apply_edit(scene: Scene, attribute: str, value: str) -> Scene:
    """The scene with one attribute changed and everything else replayed.

    Raises:
        ValueError: when that is not an edit of this scene (see ``is_edit``).
    """
    if not is_edit(scene, attribute, value):
        raise ValueError(f"Cannot change {attribute!r} to {value!r} in {scene.attributes}.")
    options = scene.options | attribute_options(scene.category, attribute, value)
    return replace(scene, attributes=_changed(scene, attribute, value), options=options)


def instruction(attribute: str, value: str, rng: np.random.Generator) -> str:
    """One of the wordings of an edit."""
    wordings = [text for text, found in _wordings() if found == (attribute, value)]
    return wordings[int(rng.integers(len(wordings)))]


def parse_instruction(text: str) -> tuple[str, str]:
    """The (attribute, value) that an instruction asks for.

    Raises:
        ValueError: when it is none of our wordings; the message has the nearest one.
    """
    wanted = " ".join(re.sub(r"[^a-z ]+", " ", str(text).lower()).split())
    known = dict(_wordings())
    if wanted not in known:
        near = get_close_matches(wanted, known, n=1, cutoff=0.0)[0]
        raise ValueError(f"Cannot understand the instruction {text!r}. Did you mean {near!r}?")
    return known[wanted]


def _changed(scene: Scene, attribute: str, value: str) -> dict[str, str]:
    return scene.attributes | {attribute: value}


def _wordings() -> Iterator[tuple[str, tuple[str, str]]]:
    """Every instruction with what it means."""
    values = {name: attribute_values("portrait")[name] for name in EDITABLE["portrait"]}
    values |= {name: attribute_values("plant")[name] for name in EDITABLE["plant"] if name != "background"}
    values["background"] = tuple(dict.fromkeys((*v.BACKGROUND, *v.PLANT_BACKGROUND)))
    for attribute, names in values.items():
        for value in names:
            if value == "bald":
                continue
            templates = _INSTRUCTIONS.get((attribute, value)) or _INSTRUCTIONS[attribute, None]
            for template in templates:
                yield template.format(_WORDS.get((attribute, value), value)), (attribute, value)
