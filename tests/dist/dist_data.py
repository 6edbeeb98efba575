"""Data that every rank makes alike."""

from __future__ import annotations

import torch

from datamodules.captioned_images import CaptionedDataset, Example

TEXTS = ("a red pot", "a tulip in a blue pot, yellow background", "a portrait of a person with red hair")


class ToyCaptions(CaptionedDataset):
    """Random pictures; every third is an edit, so some batches straddle the two tasks."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        generator = torch.Generator().manual_seed(index)
        image = torch.rand(3, 32, 32, generator=generator)
        source = torch.rand(3, 32, 32, generator=generator) if index % 3 == 0 else None
        return image, TEXTS[index % len(TEXTS)], source
