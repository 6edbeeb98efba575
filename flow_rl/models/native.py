"""How a released model is meant to be sampled: guidance, steps and image sizes, from `flow_rl/models/cards`.

A checkpoint that was trained from a released model is recognised by its configs, so its native sampling is known, too.
The demo's tiny base is nobody's released model and has none.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from flow_rl.models.loading import (
    CARDS,
    check_model_path,
    config_directory,
    known_models,
    peek_sample_sigmas,
    read_config,
)


@dataclass(frozen=True, kw_only=True)
class NativeSampling:
    """What a released model's pipeline and documentation recommend.

    Attributes:
        model: hub id.
        guidance: scale of classifier-free guidance; 1 is none.
        highest_guidance: scale above which images are out of the model's range; None where no bound is known.
        rescale: whether diffusers' pipeline rescales the guided velocity.
        num_steps: denoising steps; more than one number where the sources differ.
        default_size: width and height in pixels of what diffusers' pipeline makes by default.
        sizes: width and height in pixels of the sizes that the model's documentation lists.
        source: where all this was read.
    """

    model: str
    guidance: float
    highest_guidance: float | None
    rescale: bool
    num_steps: tuple[int, ...]
    default_size: tuple[int, int]
    sizes: tuple[tuple[int, int], ...]
    source: str

    @property
    def squares(self) -> tuple[int, ...]:
        """Sides in pixels of the square sizes, ascending: what `image_size` can be."""
        return tuple(sorted({width for width, height in (self.default_size, *self.sizes) if width == height}))


def native_sampling(path: str | Path) -> NativeSampling | None:
    """The native sampling of the released model that a directory or hub id holds, or was trained from.

    Args:
        path: directory in the diffusers layout, or hub id.

    Returns:
        None for a model of other dimensions than every released one. Noise levels that the checkpoint itself prescribes
        (`sample_sigmas`) decide the number of steps.

    Raises:
        ValueError: see `flow_rl.models.loading.check_model_path`.
    """
    name = next((name for name in _candidates(path) if _holds(path, name)), None)
    if name is None:
        return None
    native = _read_card(name)
    levels = peek_sample_sigmas(path)
    return native if levels is None else replace(native, num_steps=(len(levels),))


def _candidates(path: str | Path) -> list[str]:
    """Released models of the path's pipeline class; the path's own name first."""
    pipeline = check_model_path(path)
    return sorted(
        (name for name in known_models() if check_model_path(CARDS / name) == pipeline), key=lambda n: n != str(path)
    )


def _holds(path: str | Path, name: str) -> bool:
    """Whether the transformer at `path` has the dimensions of the released model's."""
    if not (config_directory(path) / "transformer" / "config.json").is_file():
        return False
    found, carded = read_config(path, "transformer"), read_config(CARDS / name, "transformer")
    # Cards list the class's defaults, which also stand for what a config leaves out.
    return all(found.get(key, value) == value for key, value in carded.items() if not key.startswith("_"))


def _read_card(name: str) -> NativeSampling:
    said = json.loads((CARDS / name / "card.json").read_text(encoding="utf-8"))["sampling"]
    return NativeSampling(
        model=name,
        guidance=said["guidance"],
        highest_guidance=said["highest_guidance"],
        rescale=said["rescale"],
        num_steps=tuple(said["num_steps"]),
        default_size=tuple(said["default_size"]),
        sizes=tuple((width, height) for width, height in said["sizes"]),
        source=said["source"],
    )
