"""How captions say things: one writer a category, each with several templates.

A writer takes the named attributes and a random generator (which template, which order) and returns the
caption. Everything said here is recognised by ``demo.world.grammar``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_GLASSES = {
    "none": ("no glasses", "bare eyes"),
    "round": ("round glasses",),
    "sunglasses": ("sunglasses", "dark sunglasses"),
    "visor": ("a visor",),
}
_BEARDS = {
    "none": ("no beard", "a clean shave"),
    "full": ("a full beard", "a beard"),
    "mustache": ("a mustache",),
}
_TOPS = {
    "none": ("nothing on its head", "a bare head"),
    "horns": ("horns", "two horns"),
    "antennae": ("antennae", "a pair of antennae"),
    "ears": ("round ears", "big round ears"),
    "leaf": ("a leaf on its head", "a sprouting leaf"),
}


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
        parts.append(_pick(rng, _GLASSES[named["glasses"]]))
    if "beard" in named:
        parts.append(_pick(rng, _BEARDS[named["beard"]]))
    if "shirt" in named:
        parts.append(_a(f"{named['shirt']} shirt"))
    head = _pick(rng, ("a portrait of a person", "a blocky portrait", "a person", "portrait of a person"))
    return _on_background(_with(head, parts, rng), named, rng)


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
        parts.append(_pick(rng, _TOPS[named["top"]]))
    if "eyes" in named:
        parts.append(f"{named['eyes']} eye{'' if named['eyes'] == 'one' else 's'}")
    head = _a(f"{looks} {noun}".strip())
    return _on_background(_with(head, parts, rng), named, rng)


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
        return _pick(rng, (f"{card} that says {text}", f"{card} with the text {text}", f"the text {text} on {card}"))
    ink = named["ink"]
    forms = (
        f"{card} that says {text} in {ink} letters",
        f"{card} with the {ink} text {text}",
        f"the {ink} text {text} on {card}",
    )
    return _pick(rng, forms)


WRITERS = {
    "portrait": _portrait,
    "plant": _plant,
    "creature": _creature,
    "landscape": _landscape,
    "typography": _typography,
}
