"""English captions of scenes, and their exact inverse.

``demo.world.wording`` says named attributes in words; ``parse`` recognises the same phrases (``demo.world.grammar``),
so it understands every caption, and anything else said with these words, and refuses what it does not understand.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np

from demo.world.grammar import FILLERS, HEADS, PHRASES, expand
from demo.world.vocabulary import CATEGORIES, MAX_LETTERS
from demo.world.wording import WRITERS
from demo.world.world import Scene, key_attributes, keyed_rng, split_of

_CAPTION_STREAM = 11
_NAME_PROBABILITY = 0.65
_NAME_ABSENCE_PROBABILITY = 0.3


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a prompt asks for: a category, and the values of the attributes it names."""

    category: str
    attributes: dict[str, str]


def caption(scene: Scene, seed: int, index: int, *, full: bool = False) -> str:
    """Describe a scene.

    Args:
        scene: what to describe.
        seed: which stream of captions.
        index: which caption of the stream; another index paraphrases and names another subset.
        full: name every attribute.

    Returns:
        A caption that names a random subset of the true attributes; all key attributes when the scene is not
        of the training split, so that the named combination was never trained on.
    """
    rng = keyed_rng(seed, index, _CAPTION_STREAM)
    return WRITERS[scene.category](_named(scene, rng, full), rng)


def _named(scene: Scene, rng: np.random.Generator, full: bool) -> dict[str, str]:
    """The attributes a caption names: at least one that is present."""
    attributes = scene.attributes
    if full:
        return dict(attributes)
    always = {"text"} & set(attributes)
    if split_of(scene.category, attributes) != "train":
        always |= set(key_attributes(scene.category)) & set(attributes)
    named = set(always)
    for name, value in attributes.items():
        if rng.random() < (_NAME_ABSENCE_PROBABILITY if value == "none" else _NAME_PROBABILITY):
            named.add(name)
    if not named:
        present = [name for name, value in attributes.items() if value != "none"]
        named.add(str(rng.choice(present)))
    if "position" in named:  # a place is said of something
        named.add("orb")
    return {name: value for name, value in attributes.items() if name in named}


def parse(prompt: str) -> Request:
    """Read a caption back.

    Raises:
        ValueError: when the text is not about exactly one known category, contradicts itself, or has words it
            does not understand; the message names the word and its nearest match.
    """
    text = " ".join(re.sub(r"[^A-Za-z ]+", " ", str(prompt)).split())
    category = _category(text, prompt)
    attributes: dict[str, str] = {}
    rest = text
    for pattern, fixed in PHRASES[category]:
        for match in pattern.finditer(rest):
            found = fixed | {name: expand(name, word) for name, word in match.groupdict().items() if word}
            for name, value in found.items():
                if attributes.setdefault(name, value) != value:
                    raise ValueError(f"{prompt!r} asks for {name} {attributes[name]!r} and {value!r}: choose one.")
        rest = pattern.sub(" | ", rest)
    left = [word for word in rest.replace("|", " ").split() if word.lower() not in _plain_words(category)]
    if left:
        raise ValueError(_not_understood(left, prompt, category))
    return Request(category=category, attributes=attributes)


def _category(text: str, prompt: str) -> str:
    found = [c for c in CATEGORIES if re.search(rf"\b(?:{HEADS[c]})\b", text, flags=re.IGNORECASE)]
    if len(found) != 1:
        heads = ", ".join(f"{c} ({HEADS[c].replace('|', ', ')})" for c in CATEGORIES)
        problem = f"names several categories ({', '.join(found)})" if found else "names no category"
        raise ValueError(f"{prompt!r} {problem}. Say exactly one of: {heads}.")
    return found[0]


def _plain_words(category: str) -> set[str]:
    """Words that say nothing about attributes."""
    return set(FILLERS) | set(HEADS[category].split("|"))


def _not_understood(left: list[str], prompt: str, category: str) -> str:
    """The message about words that no phrase has used: about an unknown one if there is one."""
    known = {w for pattern, _ in PHRASES[category] for w in re.findall(r"[a-z]{3,}", pattern.pattern)}
    known |= _plain_words(category)
    word = next((w for w in left if w.lower() not in known and not w.isupper()), left[0])
    if category == "typography" and word.lower() in {"says", "reads", "text"}:
        return f"Cannot read the text after {word!r} in {prompt!r}: it is 1 to {MAX_LETTERS} letters A to Z."
    if word.lower() in known:
        return f"{word!r} makes no sense where it stands in {prompt!r} (a {category}): say what it describes."
    near = get_close_matches(word.lower(), sorted(known), n=1, cutoff=0.6)
    hint = f"Did you mean {near[0]!r}?" if near else f"Words that are known here: {', '.join(sorted(known))}."
    return f"Cannot understand {word!r} in {prompt!r} (a {category}). {hint}"
