"""The demo world as a data set for flow matching: captioned scenes and edit pairs, mixed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datamodules.captioned_images import CaptionedDataset, Example
from demo.world.dataset import render_edits, render_scenes
from demo.world.degrade import CORRUPTIONS
from demo.world.world import keyed_rng
from flow_rl.models.images import from_uint8

#: kinds of damage that the demo's autoencoder lets through; it irons out blur and noise
DAMAGE = ("palette", "patches", "warp")
SEVERITIES = (0.4, 1.0)
_DAMAGE_STREAM = 41


class DemoCaptioned(CaptionedDataset):
    """Renders of one split, kept on disk after the first time.

    Args:
        split: train, validation or test.
        scenes: number of captioned images.
        edits: number of edit pairs.
        seed: which stream of scenes.
        damaged: share of the images (of edits: of the targets) that are damaged, in [0, 1]. Captions do not say so:
            a generator that learns from them draws such pictures too, as those that learn from the web do.
        cache_dir: keeps the renders.
        workers: processes that render.
    """

    def __init__(
        self,
        split: str = "train",
        scenes: int = 12000,
        edits: int = 4000,
        seed: int = 0,
        damaged: float = 0.0,
        cache_dir: str = "runs/cache",
        workers: int = 2,
    ) -> None:
        if scenes + edits < 1:
            raise ValueError("DemoCaptioned needs at least one scene or one edit pair.")
        if not 0 <= damaged <= 1:
            raise ValueError(f"damaged is {damaged}; it is a share of the images, from 0 to 1.")
        self.damaged = damaged
        self.split, self.scenes, self.edits, self.seed = split, scenes, edits, seed
        self.cache_dir, self.workers = Path(cache_dir), workers
        self._examples: list[tuple[np.ndarray, str, np.ndarray | None]] = []

    def prepare(self) -> None:
        """Render, or read what was rendered before."""
        if self._examples:
            return
        common = {"workers": self.workers, "cache_dir": self.cache_dir}
        if self.scenes:
            data = render_scenes(self.seed, range(self.scenes), self.split, **common)
            self._examples += [(image, text, None) for image, text in zip(data.images, data.captions, strict=True)]
        if self.edits:
            pairs = render_edits(self.seed, range(self.edits), self.split, **common)
            columns = zip(pairs.targets, pairs.instructions, pairs.sources, strict=True)
            self._examples += list(columns)

    def __len__(self) -> int:
        return self.scenes + self.edits

    def __getitem__(self, index: int) -> Example:
        """See `CaptionedDataset`."""
        image, text, source = self._examples[index]
        shown = damage_some(from_uint8(image[None])[0], self.damaged, seed=self.seed, index=index)
        return shown, text, None if source is None else from_uint8(source[None])[0]


def damage_some(image: Tensor, share: float, *, seed: int, index: int) -> Tensor:
    """The image (3, 32, 32), or a damaged one; which, and how, depends on (seed, index) alone."""
    rng = keyed_rng(seed, index, _DAMAGE_STREAM)
    if rng.random() >= share:
        return image
    kind, severity = str(rng.choice(DAMAGE)), float(rng.uniform(*SEVERITIES))
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    return CORRUPTIONS[kind](image[None], torch.tensor([severity]), generator)[0].clamp(0, 1)
