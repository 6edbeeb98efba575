"""Whether two saved generators differ in their transformer's weights alone, told from their files.

Post-training changes the transformer and nothing else. Two checkpoints of one base can therefore share text
encoder, image decoder and schedule, and only the transformers need to be in memory twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from flow_rl.models.loading import check_model_path, config_directory, peek_grid, peek_sigmas, read_config

#: components whose configs must agree
_CONFIGS = ("transformer", "vae", "text_encoder")
#: entries of a config that say nothing of what the component computes
_VOLATILE = {"transformers_version", "dtype", "torch_dtype", "architectures"}
#: components whose weights post-training leaves alone
_SHARED = ("vae", "text_encoder")


def check_same_generator(
    path: str | Path, reference: str | Path, *, name: str, num_steps: int, image_size: tuple[int, int]
) -> None:
    """Refuse a checkpoint that is no sibling of the reference. No model is loaded.

    Args:
        path: the checkpoint, a directory in the diffusers layout.
        reference: what it is compared with, likewise.
        name: what to call the checkpoint in an error.
        num_steps: T of the schedule that both must share.
        image_size: height and width in pixels.

    Raises:
        ValueError: a directory that is missing or incomplete; another family, architecture, latent shape, schedule,
            or other weights of the text encoder or the image decoder.
    """
    try:
        family = check_model_path(path)
        grid = peek_grid(path, image_size)
        sigmas = peek_sigmas(path, num_steps, image_size=image_size)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    expected = check_model_path(reference)
    if family != expected:
        raise ValueError(f"{name}: '{path}' holds a {family}, '{reference}' a {expected}: they must be of one family.")
    for component in _CONFIGS:
        found = _differences(read_config(reference, component), read_config(path, component))
        if found:
            raise ValueError(
                f"{name}: the {component} of '{path}' is not that of '{reference}': {', '.join(found[:3])}. "
                "A teacher and its student must come from one base."
            )
    assert grid == peek_grid(reference, image_size)  # follows from equal configs
    own = peek_sigmas(reference, num_steps, image_size=image_size)
    if not torch.equal(sigmas, own):
        raise ValueError(
            f"{name}: '{path}' steps through sigmas {_rounded(sigmas)} where '{reference}' has {_rounded(own)}. "
            "Both velocities must be asked at the same noise levels: make their scheduler configs agree."
        )
    for component in _SHARED:
        own_files, expected_files = (config_directory(p) / component for p in (path, reference))
        if not any(expected_files.glob("*.safetensors")):
            raise ValueError(f"{name}: '{reference}' has no weights on this machine yet (`hf download {reference}`).")
        different = _differing_tensor(own_files, expected_files)
        if different is not None:
            raise ValueError(
                f"{name}: the {component} of '{path}' has other weights than that of '{reference}' ({different}). The "
                "student's own is used for both, so the teacher would be shown what it never saw in training."
            )


def _differences(expected: dict[str, Any], found: dict[str, Any], prefix: str = "") -> list[str]:
    """Entries that differ, as 'name is 6, expected 4', nested ones with their path."""
    differing = []
    for key in sorted(expected.keys() | found.keys()):
        if key.startswith("_") or key in _VOLATILE:
            continue
        one, other = expected.get(key), found.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            differing += _differences(one, other, f"{prefix}{key}.")
        elif one != other:
            differing.append(f"{prefix}{key} is {_short(other)}, expected {_short(one)}")
    return differing


def _differing_tensor(path: Path, reference: Path) -> str | None:
    """Name of a tensor whose first row differs, or that one of the two lacks; None if all agree.

    Training moves every row of a weight, so one row each tells copies apart, whatever the size of the model.
    """
    found, expected = dict(_first_rows(path)), dict(_first_rows(reference))
    for key in sorted(found.keys() | expected.keys()):
        if key not in found or key not in expected or not torch.equal(found[key].float(), expected[key].float()):
            return key
    return None


def _first_rows(directory: Path) -> Iterator[tuple[str, Tensor]]:
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118  (not a mapping)
                rows = weights.get_slice(key)
                yield key, rows[:1] if rows.get_shape() else weights.get_tensor(key)


def _short(value: Any) -> str:
    text = "missing" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _rounded(sigmas: Tensor) -> list[float]:
    return [round(sigma, 3) for sigma in sigmas.tolist()]
