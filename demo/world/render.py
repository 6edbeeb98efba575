"""Draws scenes: DiceBear makes the SVG, resvg the pixels; cards are drawn with the bitmap font.

A scene's options are complete: they fix every variant and colour; the seed decides only what has no option
(where hills lie). So replaying them, or replaying them with one changed, changes nothing else.
"""

from __future__ import annotations

import io
import json
import re
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from demo.world import vocabulary as v
from demo.world.font import text_mask

if TYPE_CHECKING:  # only drawing needs the renderers: rewards read palettes here, on machines without them
    from dicebear import Style

SIZE = 32

STYLES = {"portrait": "voxel-art", "plant": "sprouts", "creature": "critters", "landscape": "landscape"}
# Portraits are framed to head and shoulders, where the named attributes are.
_VIEW_BOX = {"portrait": "12 5 104 104"}
# Pinned details: unnamed, and clutter at this size.
_PINNED: dict[str, dict[str, Any]] = {
    "portrait": {
        "outfitVariant": "plain",
        "noseVariant": "block",
        "cheeksProbability": 0,
        "eyebrowsProbability": 0,
    },
    "plant": {"patternProbability": 0, "cheeksProbability": 0},
    "creature": {"patternProbability": 0, "cheeksProbability": 0},
    "landscape": {"orbVariant": "sun"},
}
# Drawn details: unnamed diversity.
_DETAILS: dict[str, dict[str, tuple[str, ...]]] = {
    "portrait": {
        "skinColor": ("#f5d0b0", "#dda878", "#b07347", "#6a3d1f"),
        "eyesVariant": ("open", "wide", "happy"),
        "mouthVariant": ("smile", "flat", "ooh"),
        "hairColor": tuple(v.HAIR.values()),  # the beard of a bald head
    },
    "plant": {
        "plantColor": ("#34c759", "#2ea44f", "#7ed321"),
        "eyesVariant": ("round", "happy", "dots"),
        "mouthVariant": ("smile", "open", "line"),
        "bloomColor": ("#ffd43b",),
    },
    "creature": {
        "accentColor": ("#ffb347", "#39d0c8", "#ff8ac2"),
        "mouthVariant": ("smile", "open", "line"),
    },
    "landscape": {f"hill{i}Variant": ("dunes", "gentle", "peak", "rolling", "rugged") for i in (1, 2, 3, 4)},
    "typography": {},
}


def _variant(component: str, variants: dict[str, str | None], value: str) -> dict[str, Any]:
    """Options that show one variant of a component, or hide the component."""
    shown = variants[value]
    if None not in variants.values():
        return {f"{component}Variant": shown}
    return {f"{component}Variant": shown or "", f"{component}Probability": 100 if shown else 0}


def attribute_options(category: str, attribute: str, value: str) -> dict[str, Any]:
    """The renderer options that one nameable attribute sets, and nothing else sets."""
    match category, attribute:
        case "portrait", "hair":
            return _variant("top", v.HAIR_VARIANT, value)
        case "portrait", "glasses":
            return _variant("glasses", v.GLASSES_VARIANT, value)
        case "portrait", "beard":
            return _variant("beard", v.BEARD_VARIANT, value)
        case "plant", "kind":
            return _variant("plant", v.PLANT_VARIANT, value)
        case "plant", "pot_shape":
            return _variant("pot", v.POT_VARIANT, value)
        case "creature", "shape":
            return _variant("body", v.SHAPE_VARIANT, value)
        case "creature", "top":
            return _variant("top", v.TOP_VARIANT, value)
        case "creature", "eyes":
            return _variant("eyes", v.EYES_VARIANT, value)
        case "landscape", "hills":
            return {f"hill{i}Color": color for i, color in enumerate(v.HILLS[value], start=1)}
        case "landscape", "orb":
            return {"orbProbability": 0} if value == "none" else {"orbProbability": 100, "orbColor": v.ORB[value]}
        case "landscape", "position":
            return {"position": value}
        case "typography", "text":
            return {"text": value}
    return {f"{_COLOR_OPTION.get((category, attribute), attribute)}Color": palette(category, attribute)[value]}


_COLOR_OPTION = {("portrait", "hair_color"): "hair", ("landscape", "sky"): "background"}
_PALETTES = {
    ("portrait", "background"): v.BACKGROUND,
    ("portrait", "hair_color"): v.HAIR,
    ("portrait", "shirt"): v.SHIRT,
    ("plant", "background"): v.PLANT_BACKGROUND,
    ("plant", "pot"): v.POT,
    ("plant", "bloom"): v.BLOOM,
    ("creature", "background"): v.BACKGROUND,
    ("creature", "body"): v.BODY,
    ("landscape", "sky"): v.SKY,
    ("typography", "card"): v.CARD,
    ("typography", "ink"): v.INK,
}


def palette(category: str, attribute: str) -> dict[str, str]:
    """The palette (name -> hex) of a colour attribute that is one flat colour; KeyError for any other."""
    return _PALETTES[category, attribute]


def details(category: str) -> dict[str, tuple[str, ...]]:
    """The unnamed details of a category that are drawn at random: renderer option -> its values."""
    return dict(_DETAILS[category])


def draw_options(category: str, attributes: dict[str, str], rng: np.random.Generator) -> dict[str, Any]:
    """Complete renderer options: named attributes, pinned details, drawn details."""
    options: dict[str, Any] = {"seed": f"{rng.integers(2**62):x}"} | _PINNED.get(category, {})
    options |= {name: str(rng.choice(values)) for name, values in _DETAILS[category].items()}
    for name, value in attributes.items():
        options |= attribute_options(category, name, value)
    return options


@cache
def _style(category: str, position: str | None) -> Style:
    from dicebear import Style

    definition = json.loads(files("dicebear_styles").joinpath(f"{STYLES[category]}.json").read_text(encoding="utf-8"))
    if position is not None:  # DiceBear has no option for a component's place: it is part of the style
        x = v.ORB_X[position]
        definition["components"]["orb"]["translate"] = {
            "x": {"min": x, "max": x},
            "y": {"min": -12, "max": 12},
        }
    return Style(definition)


def avatar(category: str, options: dict[str, Any]) -> dict[str, Any]:
    """DiceBear's answer to our options: ``{"svg": str, "options": resolved options}``."""
    from dicebear import Avatar

    given = {name: value for name, value in options.items() if name != "position" and value != ""}
    return Avatar(_style(category, options.get("position")), given | {"animationVariant": "none"}).to_json()


def render_options(category: str, options: dict[str, Any]) -> np.ndarray:
    """Pixels of complete options: uint8 (32, 32, 3), RGB."""
    if category == "typography":
        return print_card(text_mask(options["text"], SIZE), options)
    import resvg_py

    svg = avatar(category, options)["svg"]
    if category in _VIEW_BOX:
        svg = re.sub(r'viewBox="[^"]*"', f'viewBox="{_VIEW_BOX[category]}"', svg, count=1)
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE))
    return np.array(Image.open(io.BytesIO(png)).convert("RGB"))


def print_card(mask: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    """A card in the colours of its options with this ink, bool (H, W): uint8 (H, W, 3), RGB."""
    ink, card = (np.array(_rgb(options[name]), dtype=np.uint8) for name in ("inkColor", "cardColor"))
    return np.where(mask[:, :, None], ink, card)


def _rgb(color: str) -> tuple[int, int, int]:
    return tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))  # type: ignore[return-value]
