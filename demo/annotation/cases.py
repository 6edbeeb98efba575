"""Scenes that keep or break a prompt or an instruction in a known way, for annotation and pre-training.

Every function is pure in (seed, index) and stays inside one split: prompts and pictures alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from demo.annotation.judgements import DAMAGE, IDENTITY
from demo.world.captions import Request, caption, parse
from demo.world.edits import EDITABLE, EditPair, apply_edit, is_edit, make_edit
from demo.world.looks import IDENTITY_OPTION
from demo.world.render import draw_options
from demo.world.vocabulary import ATTRIBUTES, CATEGORIES, LETTERS, MAX_LETTERS, allowed
from demo.world.world import Scene, Split, keyed_rng, make_scene, split_of

_ALIGNMENT_STREAM, _EDIT_STREAM = 17, 19
_TRIES = 200
#: what may become of an edit
OUTCOMES = ("right", "right", "half", "half", "undone", "wrong", "more", "identity", "damaged", "half_more")


@dataclass(frozen=True, kw_only=True)
class AlignmentCase:
    """One prompt and pictures that agree with it more or less.

    Attributes:
        prompt: a caption; true of the first picture's scene only if nothing was changed in it.
        request: what the prompt asks for.
        scenes: the pictures.
    """

    prompt: str
    request: Request
    scenes: tuple[Scene, ...]


@dataclass(frozen=True, kw_only=True)
class EditOutcome:
    """What came out of an instruction.

    Attributes:
        scene: the result.
        broken: `IDENTITY` where other unnamed details were drawn, `DAMAGE` where the picture is to be damaged.
    """

    scene: Scene
    broken: tuple[str, ...] = ()


def alignment_case(seed: int, index: int, *, split: Split, members: int, category: str | None = None) -> AlignmentCase:
    """Draw a prompt, and pictures in which some of what it names is different.

    Seen from a picture the prompt is a corrupted caption: the picture's own scene and the values that were replaced
    are known, so it is known which requirement fails.

    Args:
        seed: which stream.
        index: which case of the stream.
        split: of the prompt's scene and of every picture's.
        members: number of pictures.
        category: of the prompt; None draws one.
    """
    rng = keyed_rng(seed, index, _ALIGNMENT_STREAM)
    scene = make_scene(seed, int(rng.integers(2**40)), split=split, category=category)
    prompt = caption(scene, seed, int(rng.integers(2**40)))
    request = parse(prompt)
    scenes = []
    for _ in range(members):
        if rng.random() < 0.08:
            other = str(rng.choice([c for c in CATEGORIES if c != scene.category]))
            scenes.append(make_scene(seed, int(rng.integers(2**40)), split=split, category=other))
            continue
        count = min(int(rng.choice(5, p=(0.3, 0.25, 0.2, 0.15, 0.1))), len(request.attributes))
        scenes.append(alter(scene, count, sorted(request.attributes), split, rng))
    return AlignmentCase(prompt=prompt, request=request, scenes=tuple(scenes))


def alter(scene: Scene, count: int, names: list[str], split: Split, rng: np.random.Generator) -> Scene:
    """A scene in which `count` of the named attributes have other values, and unnamed details are drawn anew.

    What depends on a changed attribute follows it: a bald head has no hair colour. Where no such scene of the split
    is found, fewer attributes change.
    """
    for wanted in range(count, 0, -1):
        for _ in range(_TRIES):
            chosen = set(rng.choice(names, size=wanted, replace=False).tolist())
            attributes = _redrawn(scene, chosen, rng)
            if allowed(scene.category, attributes) and split_of(scene.category, attributes) == split:
                return _drawn(scene.category, attributes, rng)
    return _drawn(scene.category, scene.attributes, rng)


def _drawn(category: str, attributes: dict[str, str], rng: np.random.Generator) -> Scene:
    return Scene(category=category, attributes=attributes, options=draw_options(category, attributes, rng))


def _redrawn(scene: Scene, chosen: set[str], rng: np.random.Generator) -> dict[str, str]:
    attributes: dict[str, str] = {}
    for attribute in ATTRIBUTES[scene.category]:
        name, old = attribute.name, scene.attributes.get(attribute.name)
        if not attribute.exists(attributes):
            continue
        if name == "text":
            attributes[name] = _other_text(old, rng) if name in chosen else old
        elif name in chosen or old is None:
            attributes[name] = str(rng.choice([value for value in attribute.values if value != old]))
        else:
            attributes[name] = old
    return attributes


def _other_text(text: str, rng: np.random.Generator) -> str:
    """Another text: most often one letter differs, else letters are added or lost."""
    other = text
    while other == text:
        if rng.random() < 0.7:
            place = int(rng.integers(len(text)))
            other = text[:place] + str(rng.choice(list(LETTERS))) + text[place + 1 :]
        else:
            other = "".join(rng.choice(list(LETTERS), size=int(rng.integers(1, MAX_LETTERS + 1))))
    return other


def edit_case(seed: int, index: int, *, split: Split, members: int) -> tuple[EditPair, tuple[EditOutcome, ...]]:
    """Draw an edit, and results that are right, half-done, wrong, identity-breaking or damaged.

    Args:
        seed: which stream.
        index: which case of the stream.
        split: of the source and of every result.
        members: number of results, of different outcomes where possible.
    """
    rng = keyed_rng(seed, index, _EDIT_STREAM)
    pair = make_edit(seed, int(rng.integers(2**40)), split=split)
    outcomes: list[EditOutcome] = []
    while len(outcomes) < members:
        for name in rng.permutation(OUTCOMES):
            made = edit_outcome(pair, str(name), split, rng)
            if made is not None:
                outcomes.append(made)
    return pair, tuple(outcomes[:members])


def edit_outcome(pair: EditPair, name: str, split: Split, rng: np.random.Generator) -> EditOutcome | None:
    """One result of an edit.

    Args:
        pair: the edit.
        name: one of `OUTCOMES`.
        split: the result belongs to it.
        rng: decides what else changes, and to what.

    Returns:
        None where the split has no such result.
    """
    if name == "right":
        return EditOutcome(scene=pair.target)
    if name == "undone":
        return EditOutcome(scene=pair.source)
    if name == "identity":
        return EditOutcome(scene=_another(pair.target, rng), broken=(IDENTITY,))
    if name == "damaged":
        return EditOutcome(scene=pair.target, broken=(DAMAGE,))
    if name == "more":
        scene = _changed_elsewhere(pair.target, pair.attribute, split, rng)
    elif name == "wrong":
        scene = _changed_elsewhere(pair.source, pair.attribute, split, rng)
    elif name in ("half", "half_more"):
        scene = _pick(_neighbours(pair.source, (pair.attribute,), split, without=pair.value), rng)
        if scene is not None and name == "half_more":
            scene = _changed_elsewhere(scene, pair.attribute, split, rng)
    else:
        raise ValueError(f"Unknown outcome {name!r}, expected one of {sorted(set(OUTCOMES))}.")
    return None if scene is None else EditOutcome(scene=scene)


def _another(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same attributes on somebody else."""
    option = IDENTITY_OPTION[scene.category]
    while True:
        other = replace(scene, options=draw_options(scene.category, scene.attributes, rng))
        if other.options[option] != scene.options[option]:
            return other


def _changed_elsewhere(scene: Scene, attribute: str, split: Split, rng: np.random.Generator) -> Scene | None:
    return _pick(_neighbours(scene, [n for n in EDITABLE[scene.category] if n != attribute], split), rng)


def _neighbours(scene: Scene, names: object, split: Split, *, without: str | None = None) -> Iterator[Scene]:
    """Every scene of the split that differs in one of the named attributes."""
    for attribute in ATTRIBUTES[scene.category]:
        if attribute.name in names:  # type: ignore[operator]
            for value in attribute.values:
                if value != without and is_edit(scene, attribute.name, value):
                    changed = apply_edit(scene, attribute.name, value)
                    if split_of(scene.category, changed.attributes) == split:
                        yield changed


def _pick(scenes: Iterator[Scene], rng: np.random.Generator) -> Scene | None:
    found = list(scenes)
    return found[int(rng.integers(len(found)))] if found else None
