"""What the demo world can show and name: categories, attributes, closed sets of values, palettes.

Every value here is visually distinct at 32 x 32 pixels. Colours have one name and one hex value a palette;
names are what captions say, hex values are what the renderer draws and what exact verifiers compare with.
"""

from __future__ import annotations

from dataclasses import dataclass

CATEGORIES = ("portrait", "plant", "creature", "landscape", "typography")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MAX_LETTERS = 4

BACKGROUND = {
    "red": "#d9483b",
    "yellow": "#f2cc45",
    "green": "#4fa35a",
    "blue": "#4a8be0",
    "purple": "#8a58c2",
    "white": "#f4f4f4",
}
HAIR = {
    "black": "#1c1a22",
    "blonde": "#f7d14a",
    "red": "#d8342c",
    "blue": "#2f6fe0",
    "green": "#2fa84f",
    "gray": "#c9ced6",
}
SHIRT = {
    "red": "#e0352b",
    "yellow": "#fab005",
    "green": "#37a84a",
    "blue": "#2c63d6",
    "white": "#f8f9fa",
    "black": "#26282c",
}
PLANT_BACKGROUND = {
    **{name: BACKGROUND[name] for name in ("red", "yellow", "blue", "purple", "white")},
    "black": "#1f2430",
}
POT = {"red": "#e5574b", "yellow": "#f7c948", "blue": "#5b9bf0", "purple": "#a573dc", "white": "#f1f3f5"}
BLOOM = {"red": "#ef3b36", "yellow": "#ffd43b", "blue": "#3f8cff", "pink": "#ff8ac2", "white": "#ffffff"}
BODY = {
    "red": "#ef6a5e",
    "yellow": "#fbd75a",
    "green": "#6cc878",
    "blue": "#6ba7f2",
    "purple": "#b083e6",
    "white": "#eef1f5",
}
SKY = {"blue": "#86c8f2", "pink": "#f6a5c6", "orange": "#f5964a", "black": "#1d2340"}
ORB = {"sun": "#ffe14a", "moon": "#ffffff"}
HILLS = {  # from the farthest hill to the nearest
    "green": ("#a5d88c", "#7cc465", "#4f9e48", "#2f7337"),
    "sandy": ("#f2dfae", "#e3c480", "#c9a055", "#a67c3a"),
    "blue": ("#a9cdf0", "#74a9e0", "#4580c4", "#275a9c"),
    "purple": ("#d2b3ec", "#b084d8", "#8a57b8", "#633a8e"),
    "red": ("#eaa08f", "#d86f5c", "#b84a3a", "#8e2f25"),
    "snowy": ("#ffffff", "#eef2f6", "#dfe6ee", "#cfd8e2"),
}
INK = {
    "black": "#16181d",
    "white": "#ffffff",
    "red": "#d62424",
    "blue": "#1f4fd8",
    "green": "#16803a",
    "yellow": "#ffd83d",
}
CARD = {
    "white": "#f7f7f7",
    "yellow": "#f7d154",
    "pink": "#f7b3d0",
    "orange": "#f39a3d",
    "purple": "#7b4cc0",
    "black": "#1f2229",
}

# DiceBear's variant name for each value that is a shape.
HAIR_VARIANT = {
    "bald": None,
    "short": "short",
    "spiky": "spiky",
    "mohawk": "mohawk",
    "buns": "buns",
    "long": "longStraight",
}
GLASSES_VARIANT = {"none": None, "round": "round", "sunglasses": "shades", "visor": "visor"}
BEARD_VARIANT = {"none": None, "full": "full", "mustache": "mustache"}
PLANT_VARIANT = {name: name for name in ("cactus", "bush", "flower", "tulip", "palm", "succulent")}
POT_VARIANT = {"round": "round", "square": "cylinder"}
SHAPE_VARIANT = {"square": "block", "tall": "tower", "wide": "squat", "pointed": "peak", "stepped": "steps"}
TOP_VARIANT = {"none": None, "horns": "horns", "antennae": "antennae", "ears": "earsRound", "leaf": "sprout"}
EYES_VARIANT = {"one": "mono", "two": "round", "three": "trio"}
ORB_X = {"left": -125.0, "middle": 0.0, "right": 125.0}  # percent of the orb's width


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """One nameable attribute of a category.

    Attributes:
        name: the attribute's name.
        values: all values; empty for typography's text, which is 1 to 4 letters.
        key: whether it is part of the combination that decides the split.
        when: (other attribute, values of it) under which this attribute exists; None: always.
        unlike: attributes whose value name this one may not share, or it would be invisible.
    """

    name: str
    values: tuple[str, ...]
    key: bool = False
    when: tuple[str, frozenset[str]] | None = None
    unlike: tuple[str, ...] = ()

    def exists(self, attributes: dict[str, str]) -> bool:
        """Whether the attribute exists beside the (earlier) ``attributes``."""
        return self.when is None or attributes[self.when[0]] in self.when[1]


_FLOWERING = frozenset({"flower", "tulip"})
_HAIRY = frozenset(HAIR_VARIANT) - {"bald"}

ATTRIBUTES: dict[str, tuple[Attribute, ...]] = {
    "portrait": (
        Attribute(name="background", values=tuple(BACKGROUND), key=True),
        Attribute(name="hair", values=tuple(HAIR_VARIANT), key=True),
        Attribute(name="hair_color", values=tuple(HAIR), key=True, when=("hair", _HAIRY), unlike=("background",)),
        Attribute(name="glasses", values=tuple(GLASSES_VARIANT)),
        Attribute(name="beard", values=tuple(BEARD_VARIANT)),
        Attribute(name="shirt", values=tuple(SHIRT), unlike=("background",)),
    ),
    "plant": (
        Attribute(name="background", values=tuple(PLANT_BACKGROUND), key=True),
        Attribute(name="kind", values=tuple(PLANT_VARIANT), key=True),
        Attribute(name="pot", values=tuple(POT), key=True, unlike=("background",)),
        Attribute(name="pot_shape", values=tuple(POT_VARIANT)),
        Attribute(name="bloom", values=tuple(BLOOM), when=("kind", _FLOWERING), unlike=("background",)),
    ),
    "creature": (
        Attribute(name="background", values=tuple(BACKGROUND), key=True),
        Attribute(name="body", values=tuple(BODY), key=True, unlike=("background",)),
        Attribute(name="shape", values=tuple(SHAPE_VARIANT)),
        Attribute(name="top", values=tuple(TOP_VARIANT), key=True),
        Attribute(name="eyes", values=tuple(EYES_VARIANT)),
    ),
    "landscape": (
        Attribute(name="sky", values=tuple(SKY), key=True),
        Attribute(name="orb", values=("none", *ORB), key=True),
        Attribute(name="position", values=tuple(ORB_X), key=True, when=("orb", frozenset(ORB))),
        Attribute(name="hills", values=tuple(HILLS), key=True),
    ),
    "typography": (
        Attribute(name="card", values=tuple(CARD)),
        Attribute(name="ink", values=tuple(INK)),
        Attribute(name="text", values=(), key=True),
    ),
}

# Inks that can be read on each card.
LEGIBLE: dict[str, tuple[str, ...]] = {
    "white": ("black", "red", "blue", "green"),
    "yellow": ("black", "red", "blue", "green"),
    "pink": ("black", "red", "blue", "green"),
    "orange": ("black", "white", "blue"),
    "purple": ("white", "yellow"),
    "black": ("white", "yellow"),
}


def allowed(category: str, attributes: dict[str, str]) -> bool:
    """Whether nothing in ``attributes`` (all of a scene's) would be invisible in front of something else."""
    for attribute in ATTRIBUTES[category]:
        value = attributes.get(attribute.name)
        if value is not None and any(attributes.get(other) == value for other in attribute.unlike):
            return False
    return category != "typography" or attributes["ink"] in LEGIBLE[attributes["card"]]
