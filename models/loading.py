"""Find the family of a saved model and load it."""

from __future__ import annotations

import difflib
import json
import math
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from flow.schedule import sigma_schedule
from models.image_model import ImageModel
from models.pipeline_model import PipelineModel
from models.qwen_image import QwenImage
from models.qwen_image_21 import QwenImage21

#: pipeline class named in a directory's model_index.json -> family
FAMILIES: dict[str, type[PipelineModel]] = {
    "QwenImage21Pipeline": QwenImage21,
    "QwenImagePipeline": QwenImage,
    "QwenImageEditPipeline": QwenImage,
    "QwenImageEditPlusPipeline": QwenImage,
}


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
    name = _read_json(index).get("_class_name")
    if name not in FAMILIES:
        raise ValueError(f"'{directory}' holds a {name}; supported families: {', '.join(FAMILIES)}.")
    return name


def peek_grid(path: str | Path, image_size: tuple[int, int]) -> tuple[int, int]:
    """Height and width in latent tokens of an image, from the VAE's config alone: no weights are loaded.

    Raises:
        ValueError: see `check_model_path`; a VAE config that is missing; a size that the model cannot make.
    """
    check_model_path(path)
    config = Path(path) / "vae" / "config.json"
    if not config.is_file():
        raise ValueError(f"'{path}' has no vae/config.json: the model directory is incomplete.")
    return latent_grid(image_size, _read_json(config)["scale_factor_spatial"])


def peek_sigmas(path: str | Path, num_steps: int, *, image_size: tuple[int, int]) -> Tensor:
    """The schedule that the model's own `sigmas` would give, from configs alone: no weights are loaded.

    Args:
        path: directory in the diffusers layout.
        num_steps: T.
        image_size: height and width in pixels.

    Returns:
        float32 (T + 1,), from 1 down to 0.

    Raises:
        ValueError: see `peek_grid`; a scheduler config that is missing.
    """
    grid = peek_grid(path, image_size)
    if not (Path(path) / "scheduler" / "scheduler_config.json").is_file():
        raise ValueError(f"'{path}' has no scheduler/scheduler_config.json: the model directory is incomplete.")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(str(path), subfolder="scheduler")
    return sigma_schedule(scheduler, num_steps, image_tokens=math.prod(grid))


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"'{path}', line {error.lineno}: not JSON ({error.msg}).") from None


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
