"""Rendered scenes and edit pairs as arrays, with an optional cache on disk.

Shapes: N samples, H = W = 32.
"""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from demo.world.cache import cached_arrays
from demo.world.captions import caption
from demo.world.edits import make_edit
from demo.world.world import WORLD_VERSION, Split, make_scene, render


@dataclass(frozen=True, kw_only=True)
class CaptionedImages:
    """Images with their captions.

    Attributes:
        images: uint8 (N, 32, 32, 3), RGB.
        captions: N texts.
        categories: N categories.
    """

    images: np.ndarray
    captions: list[str]
    categories: list[str]


@dataclass(frozen=True, kw_only=True)
class EditImages:
    """Edit pairs as pixels.

    Attributes:
        sources: uint8 (N, 32, 32, 3), RGB.
        instructions: N texts.
        targets: uint8 (N, 32, 32, 3), RGB.
        categories: N categories.
    """

    sources: np.ndarray
    instructions: list[str]
    targets: np.ndarray
    categories: list[str]


def render_scenes(
    seed: int,
    indices: Sequence[int],
    split: Split,
    *,
    category: str | None = None,
    full: bool = False,
    workers: int = 0,
    cache_dir: str | Path | None = None,
) -> CaptionedImages:
    """Render scenes ``(seed, index)`` with a caption each.

    Args:
        seed: which stream of scenes and captions.
        indices: which scenes of the stream.
        split: split of all scenes.
        category: None draws one for each scene.
        full: captions name every attribute.
        workers: processes that render; 0 renders here. The result does not depend on it.
        cache_dir: where to keep (and find) the result; None keeps nothing.
    """
    make = partial(_captioned, seed, split=split, category=category, full=full)
    key = ("scenes", seed, split, category, full)
    data = _cached(make, indices, workers, cache_dir, key, ("images", "captions", "categories"))
    return CaptionedImages(
        images=data["images"], captions=data["captions"].tolist(), categories=data["categories"].tolist()
    )


def render_edits(
    seed: int,
    indices: Sequence[int],
    split: Split,
    *,
    category: str | None = None,
    workers: int = 0,
    cache_dir: str | Path | None = None,
) -> EditImages:
    """Render edit pairs ``(seed, index)``; arguments as in ``render_scenes``."""
    make = partial(_edited, seed, split=split, category=category)
    fields = ("sources", "instructions", "targets", "categories")
    data = _cached(make, indices, workers, cache_dir, ("edits", seed, split, category), fields)
    return EditImages(
        sources=data["sources"],
        instructions=data["instructions"].tolist(),
        targets=data["targets"],
        categories=data["categories"].tolist(),
    )


def _captioned(seed: int, index: int, *, split: Split, category: str | None, full: bool) -> tuple[np.ndarray, str, str]:
    scene = make_scene(seed, index, split=split, category=category)
    return render(scene), caption(scene, seed, index, full=full), scene.category


def _edited(seed: int, index: int, *, split: Split, category: str | None) -> tuple[np.ndarray, str, np.ndarray, str]:
    pair = make_edit(seed, index, split=split, category=category)
    return render(pair.source), pair.instruction, render(pair.target), pair.category


def _cached(
    make: Callable[[int], tuple],
    indices: Sequence[int],
    workers: int,
    cache_dir: str | Path | None,
    key: tuple,
    fields: tuple[str, ...],
) -> dict[str, np.ndarray]:
    indices = [int(index) for index in indices]
    if not indices:
        raise ValueError("Nothing to render: indices is empty.")
    path = None
    if cache_dir is not None:
        name = hashlib.blake2b(repr((WORLD_VERSION, *key, indices)).encode(), digest_size=12).hexdigest()
        path = Path(cache_dir) / f"{key[0]}-{name}.npz"
    return cached_arrays(path, partial(_columns, make, indices, workers, fields))


def _columns(
    make: Callable[[int], tuple], indices: Sequence[int], workers: int, fields: tuple[str, ...]
) -> dict[str, np.ndarray]:
    if workers > 0:
        # Spawned, not forked: the caller may hold threads (torch) that do not survive a fork.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max_workers=workers, mp_context=context) as pool:
            rows = list(pool.map(make, indices, chunksize=64))
    else:
        rows = [make(index) for index in indices]
    return {field: np.array(column) for field, column in zip(fields, zip(*rows, strict=True), strict=True)}
