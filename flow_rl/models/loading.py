"""Find the family of a saved model and load it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from flow_rl.flow.schedule import sigma_schedule
from flow_rl.models.image_model import ImageModel
from flow_rl.models.memory import WeightDtypes
from flow_rl.models.pipeline_model import PipelineModel
from flow_rl.models.qwen_image import QwenImage
from flow_rl.models.qwen_image_21 import QwenImage21
from flow_rl.suggestions import nearest, nearest_path

#: pipeline class named in a directory's model_index.json -> family
FAMILIES: dict[str, type[PipelineModel]] = {
    "QwenImage21Pipeline": QwenImage21,
    "QwenImagePipeline": QwenImage,
    "QwenImageEditPipeline": QwenImage,
    "QwenImageEditPlusPipeline": QwenImage,
}

#: configs of released models, so that a run can be checked and planned before anything is downloaded
CARDS = Path(__file__).parent / "cards"


def config_directory(path: str | Path) -> Path:
    """The local directory that holds a model's configs, in the diffusers layout.

    Args:
        path: a directory, or a hub id such as `Qwen/Qwen-Image-2.1`. An id is looked for among what was downloaded to
            the Hugging Face cache, then among the cards that ship with this project (`flow_rl/models/cards`): nothing
            is fetched.

    Raises:
        ValueError: neither a directory nor a known id.
    """
    directory = Path(path)
    if directory.is_dir():
        return directory
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        index = try_to_load_from_cache(str(path), "model_index.json")
        if isinstance(index, str):
            return Path(index).parent
        if (card := CARDS / str(path)).is_dir():
            return card
    hint = nearest_path(directory) or nearest(str(path), known_models())
    raise ValueError(
        f"No model directory at '{directory}'.{hint} Expected a directory in the diffusers layout, or the hub id of a "
        "model that was downloaded (`hf download ID`)."
    )


def known_models() -> list[str]:
    """Hub ids whose configs ship with this project."""
    return sorted(str(index.parent.relative_to(CARDS)) for index in CARDS.glob("*/*/model_index.json"))


def check_model_path(path: str | Path) -> str:
    """The family named by a model's configs, without loading it.

    Raises:
        ValueError: see `config_directory`; not the diffusers layout, or a family that is not supported.
    """
    index = config_directory(path) / "model_index.json"
    if not index.is_file():
        raise ValueError(
            f"'{path}' has no model_index.json, so it is not in the diffusers layout. "
            "Point at the directory that `save_pretrained` wrote."
        )
    name = _read_json(index).get("_class_name")
    if name not in FAMILIES:
        raise ValueError(f"'{path}' holds a {name}; supported families: {', '.join(FAMILIES)}.")
    return str(name)


def read_config(path: str | Path, part: str) -> dict[str, Any]:
    """A component's config.json.

    Raises:
        ValueError: see `config_directory`; a config that is missing or not JSON.
    """
    config = config_directory(path) / part / "config.json"
    if not config.is_file():
        raise ValueError(f"'{path}' has no {part}/config.json: the model directory is incomplete.")
    return _read_json(config)


def peek_grid(path: str | Path, image_size: tuple[int, int]) -> tuple[int, int]:
    """Height and width in latent tokens of an image, from the VAE's config alone: no weights are loaded.

    Raises:
        ValueError: see `check_model_path`; a VAE config that is missing; a size that the model cannot make.
    """
    return FAMILIES[check_model_path(path)].token_grid(read_config(path, "vae"), image_size)


def peek_sigmas(path: str | Path, num_steps: int, *, image_size: tuple[int, int]) -> Tensor:
    """The schedule that the model's own `sigmas` would give, from configs alone: no weights are loaded.

    Args:
        path: directory in the diffusers layout, or hub id.
        num_steps: T.
        image_size: height and width in pixels.

    Returns:
        float32 (T + 1,), from 1 down to 0.

    Raises:
        ValueError: see `peek_grid`; a scheduler config that is missing; another number of steps than the model
            prescribes (see `flow_rl.flow.schedule.sigma_schedule`).
    """
    grid, directory = peek_grid(path, image_size), config_directory(path)
    if not (directory / "scheduler" / "scheduler_config.json").is_file():
        raise ValueError(f"'{path}' has no scheduler/scheduler_config.json: the model directory is incomplete.")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(str(directory), subfolder="scheduler")
    return sigma_schedule(scheduler, num_steps, image_tokens=math.prod(grid), sample_sigmas=peek_sample_sigmas(path))


def peek_sample_sigmas(path: str | Path) -> list[float] | None:
    """The noise levels that a model's `model_index.json` prescribes, without the final 0; None where it has none.

    Raises:
        ValueError: see `check_model_path`.
    """
    family = FAMILIES[check_model_path(path)]
    return family.sample_sigmas(_read_json(config_directory(path) / "model_index.json"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"'{path}', line {error.lineno}: not JSON ({error.msg}).") from None
    return content


def load_image_model(
    path: str | Path,
    *,
    image_size: tuple[int, int],
    dtypes: WeightDtypes = WeightDtypes(),  # noqa: B008  (frozen)
    empty: bool = False,
) -> ImageModel:
    """Load a generator of any supported family.

    Args:
        path: directory in the diffusers layout, or hub id.
        image_size: default height and width in pixels.
        dtypes: of the weights, which are loaded in no other on the way; buffers are float32.
        empty: leave the weights on disk (see `ImageModel.from_pretrained`); `strategies.distribute` fills them in.

    Raises:
        ValueError: see `check_model_path`.
    """
    family = FAMILIES[check_model_path(path)]
    return family.from_pretrained(path, image_size=image_size, dtypes=dtypes, empty=empty)
