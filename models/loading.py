"""Find the family of a saved model and load it."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

import torch

from models.image_model import ImageModel
from models.qwen_image_21 import QwenImage21

#: pipeline class named in a directory's model_index.json -> family
FAMILIES: dict[str, type[ImageModel]] = {"QwenImage21Pipeline": QwenImage21}


def check_model_path(path: str | Path) -> str:
    """The family named by a local directory, without loading it.

    Raises:
        ValueError: no such directory, not the diffusers layout, or a family that is not supported.
    """
    directory = Path(path)
    if not directory.is_dir():
        near = difflib.get_close_matches(
            directory.name, [p.name for p in directory.parent.glob("*")] if directory.parent.is_dir() else [], 1
        )
        hint = f" Did you mean '{directory.parent / near[0]}'?" if near else ""
        raise ValueError(f"No model directory at '{directory}'.{hint} Expected a directory in the diffusers layout.")
    index = directory / "model_index.json"
    if not index.is_file():
        raise ValueError(
            f"'{directory}' has no model_index.json, so it is not in the diffusers layout. "
            "Point at the directory that `save_pretrained` wrote."
        )
    name = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    if name not in FAMILIES:
        raise ValueError(f"'{directory}' holds a {name}; supported families: {', '.join(FAMILIES)}.")
    return name


def load_image_model(
    path: str | Path, *, image_size: tuple[int, int], dtype: torch.dtype = torch.float32
) -> ImageModel:
    """Load a generator of any supported family.

    Args:
        path: directory in the diffusers layout.
        image_size: default height and width in pixels.
        dtype: of the weights.

    Raises:
        ValueError: see `check_model_path`.
    """
    return FAMILIES[check_model_path(path)].from_pretrained(path, image_size=image_size, dtype=dtype)
