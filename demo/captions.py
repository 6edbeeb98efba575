"""English captions of scenes, and their exact inverse.

A caption is assembled from phrases; ``parse`` recognises the same phrases, so it understands every caption (and
anything else said with the same words), and refuses what it does not understand.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np

from demo.grammar import FILLERS, HEADS, PHRASES, expand
from demo.world import CATEGORIES, Scene, key_attributes, keyed_rng, split_of

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
        A caption that names a random subset of the true attributes; all key attributes when the scene is not of
        the training split, so that the named combination was never trained on.
    """
    rng = keyed_rng(seed, index, _CAPTION_STREAM)
    return _WRITERS[scene.category](_named(scene, rng, full), rng)


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
                    raise ValueError(
                        f"{prompt!r} asks for {name} {attributes[name]!r} and {value!r}: choose one."
                    )
        rest = pattern.sub(" | ", rest)
    for word in rest.replace("|", " ").split():
        if word.lower() not in FILLERS and word.lower() not in HEADS[category].split("|"):
            raise ValueError(_not_understood(word, prompt, category))
    return Request(category=category, attributes=attributes)


def _category(text: str, prompt: str) -> str:
    found = [c for c in CATEGORIES if re.search(rf"\b(?:{HEADS[c]})\b", text, flags=re.IGNORECASE)]
    if len(found) != 1:
        heads = ", ".join(f"{c} ({HEADS[c].replace('|', ', ')})" for c in CATEGORIES)
        problem = f"names several categories ({', '.join(found)})" if found else "names no category"
        raise ValueError(f"{prompt!r} {problem}. Say exactly one of: {heads}.")
    return found[0]


def _not_understood(word: str, prompt: str, category: str) -> str:
    known = {w for pattern, _ in PHRASES[category] for w in re.findall(r"[a-z]{3,}", pattern.pattern)}
    known |= set(FILLERS) | set(HEADS[category].split("|"))
    near = get_close_matches(word.lower(), sorted(known), n=1, cutoff=0.5)
    hint = (
        f" Did you mean {near[0]!r}?" if near else f" Words about a {category}: {', '.join(sorted(known))}."
    )
    return f"Cannot understand {word!r} in {prompt!r} (a {category}).{hint}"


def _a(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _list(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _with(head: str, parts: list[str], rng: np.random.Generator) -> str:
    """``head`` with its parts, in a drawn order."""
    if not parts:
        return head
    return f"{head} with {_list([parts[i] for i in rng.permutation(len(parts))])}"


def _on_background(text: str, named: dict[str, str], rng: np.random.Generator) -> str:
    if "background" not in named:
        return text
    color = named["background"]
    form = _pick(rng, ("{0} on {1} background", "{0}, {2} background", "on {1} background, {0}"))
    return form.format(text, _a(color), color)


def _portrait(named: dict[str, str], rng: np.random.Generator) -> str:
    parts = []
    hair, color = named.get("hair"), named.get("hair_color", "")
    if hair == "bald":
        parts.append("a bald head")
    elif hair in ("mohawk", "buns"):
        noun = "mohawk" if hair == "mohawk" else "hair buns"
        phrase = f"{color} {noun}".strip()
        parts.append(_a(phrase) if hair == "mohawk" else phrase)
    elif hair or color:
        parts.append(f"{hair or ''} {color} hair".strip().replace("  ", " "))
    if "glasses" in named:
        parts.append(_pick(rng, GLASSES[named["glasses"]]))
    if "beard" in named:
        parts.append(_pick(rng, BEARDS[named["beard"]]))
    if "shirt" in named:
        parts.append(_a(f"{named['shirt']} shirt"))
    head = _pick(rng, ("a portrait of a person", "a blocky portrait", "a person", "portrait of a person"))
    return _on_background(_with(head, parts, rng), named, rng)


GLASSES = {
    "none": ("no glasses", "bare eyes"),
    "round": ("round glasses",),
    "sunglasses": ("sunglasses", "dark sunglasses"),
    "visor": ("a visor",),
}
BEARDS = {
    "none": ("no beard", "a clean shave"),
    "full": ("a full beard", "a beard"),
    "mustache": ("a mustache",),
}


def _plant(named: dict[str, str], rng: np.random.Generator) -> str:
    kind = named.get("kind", "plant")
    pot = " ".join(named[name] for name in ("pot_shape", "pot") if name in named)
    bloom = f"{named['bloom']} bloom" if "bloom" in named else ""
    if pot and bloom:
        text = f"a potted {kind} with {_a(bloom)} in {_a(pot)} pot"
    elif pot:
        text = _pick(rng, (f"a potted {kind} in {_a(pot)} pot", f"{_a(pot)} pot with a potted {kind}"))
    elif bloom:
        text = _pick(rng, (f"a potted {kind} with {_a(bloom)}", f"{_a(bloom)} on a potted {kind}"))
    else:
        text = _pick(rng, (f"a potted {kind}", f"a picture of a potted {kind}"))
    return _on_background(text, named, rng)


def _creature(named: dict[str, str], rng: np.random.Generator) -> str:
    looks = " ".join(named[name] for name in ("shape", "body") if name in named)
    noun = _pick(rng, ("creature", "monster"))
    parts = []
    if "top" in named:
        parts.append(_pick(rng, TOPS[named["top"]]))
    if "eyes" in named:
        parts.append(f"{named['eyes']} eye{'' if named['eyes'] == 'one' else 's'}")
    head = _a(f"{looks} {noun}".strip())
    return _on_background(_with(head, parts, rng), named, rng)


TOPS = {
    "none": ("nothing on its head", "a bare head"),
    "horns": ("horns", "two horns"),
    "antennae": ("antennae", "a pair of antennae"),
    "ears": ("round ears", "big round ears"),
    "leaf": ("a leaf on its head", "a sprouting leaf"),
}


def _landscape(named: dict[str, str], rng: np.random.Generator) -> str:
    parts = []
    if "hills" in named:
        parts.append(f"{named['hills']} hills")
    if "sky" in named:
        parts.append(_a(f"{named['sky']} sky"))
    if "orb" in named:
        parts.append(_orb(named, rng))
    head = _pick(rng, ("a landscape", "a landscape picture", "a quiet landscape", "landscape"))
    return _with(head, parts, rng)


def _orb(named: dict[str, str], rng: np.random.Generator) -> str:
    if named["orb"] == "none":
        return _pick(rng, ("no sun or moon", "nothing in the sky"))
    if "position" not in named:
        return f"a {named['orb']}"
    place = "in the middle" if named["position"] == "middle" else f"on the {named['position']}"
    return f"a {named['orb']} {place}"


def _typography(named: dict[str, str], rng: np.random.Generator) -> str:
    text = " ".join(named["text"])
    card = _a(f"{named['card']} card" if "card" in named else "card")
    if "ink" not in named:
        return _pick(
            rng, (f"{card} that says {text}", f"{card} with the text {text}", f"the text {text} on {card}")
        )
    ink = named["ink"]
    forms = (
        f"{card} that says {text} in {ink} letters",
        f"{card} with the {ink} text {text}",
        f"the {ink} text {text} on {card}",
    )
    return _pick(rng, forms)


_WRITERS = {
    "portrait": _portrait,
    "plant": _plant,
    "creature": _creature,
    "landscape": _landscape,
    "typography": _typography,
}
