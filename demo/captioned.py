"""The demo world as a data set for flow matching: captioned scenes and edit pairs, mixed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from datamodules.captioned_images import CaptionedDataset, Example
from demo.dataset import render_edits, render_scenes
from models.images import from_uint8


class DemoCaptioned(CaptionedDataset):
    """Renders of one split, kept on disk after the first time.

    Args:
        split: train, validation or test.
        scenes: number of captioned images.
        edits: number of edit pairs.
        seed: which stream of scenes.
        cache_dir: keeps the renders.
        workers: processes that render.
    """

    def __init__(
        self,
        split: str = "train",
        scenes: int = 12000,
        edits: int = 4000,
        seed: int = 0,
        cache_dir: str = "runs/cache",
        workers: int = 2,
    ) -> None:
        if scenes + edits < 1:
            raise ValueError("DemoCaptioned needs at least one scene or one edit pair.")
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
        return from_uint8(image[None])[0], text, None if source is None else from_uint8(source[None])[0]
