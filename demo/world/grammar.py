"""The phrases that captions are made of, as patterns: what ``captions.parse`` recognises.

Each category has an ordered list of (pattern, attributes it always means); a named group means the attribute
of its name, with the group's word as value. Longer phrases come first, because a recognised phrase is
removed.
"""

from __future__ import annotations

import re

from demo.world import vocabulary as v

# The words that say which category a text is about.
HEADS = {
    "portrait": "portrait|person|people|someone",
    "plant": "potted|plant",
    "creature": "creature|monster",
    "landscape": "landscape",
    "typography": "card",
}
_FILLERS = """
    a an the of with and in on its it that has who wearing is against please show
    picture image painting drawing blocky quiet
"""
FILLERS = frozenset(_FILLERS.split())


def _one_of(values: object) -> str:
    return "|".join(values)  # type: ignore[arg-type]


_PLANTS = _one_of(v.PLANT_VARIANT)

_SOURCES: dict[str, list[tuple[str, dict[str, str]]]] = {
    "portrait": [
        (rf"(?P<background>{_one_of(v.BACKGROUND)}) background", {}),
        (r"bald(?: head)?", {"hair": "bald"}),
        (rf"(?:(?P<hair_color>{_one_of(v.HAIR)}) )?hair buns", {"hair": "buns"}),
        (rf"(?:(?P<hair_color>{_one_of(v.HAIR)}) )?mohawk", {"hair": "mohawk"}),
        (rf"(?:(?P<hair>short|spiky|long) )?(?:(?P<hair_color>{_one_of(v.HAIR)}) )?hair", {}),
        (r"(?:no|without) glasses|bare eyes", {"glasses": "none"}),
        (r"(?:dark )?sunglasses", {"glasses": "sunglasses"}),
        (r"round glasses", {"glasses": "round"}),
        (r"visor", {"glasses": "visor"}),
        (r"(?:no|without a) beard|clean shave", {"beard": "none"}),
        (r"(?:full )?beard", {"beard": "full"}),
        (r"mustache", {"beard": "mustache"}),
        (rf"(?P<shirt>{_one_of(v.SHIRT)}) shirt", {}),
    ],
    "plant": [
        (rf"(?P<background>{_one_of(v.PLANT_BACKGROUND)}) background", {}),
        (rf"(?:(?P<pot_shape>{_one_of(v.POT_VARIANT)}) )?(?:(?P<pot>{_one_of(v.POT)}) )?pot", {}),
        (rf"(?P<bloom>{_one_of(v.BLOOM)}) bloom", {}),
        (rf"(?P<kind>{_PLANTS})", {}),
    ],
    "creature": [
        (rf"(?P<background>{_one_of(v.BACKGROUND)}) background", {}),
        (r"nothing on its head|(?:a )?bare head", {"top": "none"}),
        (r"(?:two )?horns", {"top": "horns"}),
        (r"(?:pair of )?antennae", {"top": "antennae"}),
        (r"(?:big )?round ears", {"top": "ears"}),
        (r"(?:sprouting )?leaf(?: on its head)?", {"top": "leaf"}),
        (rf"(?P<eyes>{_one_of(v.EYES_VARIANT)}) eyes?", {}),
        (
            rf"(?:(?P<shape>{_one_of(v.SHAPE_VARIANT)}) )?(?:(?P<body>{_one_of(v.BODY)}) )?"
            r"(?:creature|monster)",
            {},
        ),
    ],
    "landscape": [
        (r"no (?:sun|moon)(?: or (?:sun|moon))?|nothing in the sky", {"orb": "none"}),
        (rf"(?P<orb>sun|moon)(?: (?:on|in) the (?P<position>{_one_of(v.ORB_X)}))?", {}),
        (rf"(?P<hills>{_one_of(v.HILLS)}) hills", {}),
        (rf"(?P<sky>{_one_of(v.SKY)}) sky", {}),
    ],
    "typography": [
        (rf"(?:(?P<card>{_one_of(v.CARD)}) )?card", {}),
        (rf"(?P<ink>{_one_of(v.INK)}) letters", {}),
        (
            rf"(?:says|reads|(?:(?P<ink>{_one_of(v.INK)}) )?text) "
            rf"(?P<text>(?-i:[A-Z])(?: ?(?-i:[A-Z])){{0,{v.MAX_LETTERS - 1}}})(?! ?(?-i:[A-Z]))",
            {},
        ),
    ],
}
PHRASES = {
    category: [(re.compile(rf"\b(?:{source})\b", flags=re.IGNORECASE), fixed) for source, fixed in sources]
    for category, sources in _SOURCES.items()
}


def expand(attribute: str, word: str) -> str:
    """The value that a matched word means."""
    return word.replace(" ", "") if attribute == "text" else word.lower()
