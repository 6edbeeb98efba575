"""Quality of an image, 1 to 5, learned from renders damaged with a known severity.

Shapes: N images, C = 3, H = W = 32, D features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class QualityScore(nn.Module, ABC):
    """Scores how free of damage images are: 5 for a clean render, 1 for a wrecked one."""

    #: from features to one unbounded score
    head: nn.Module

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """What the score is made from, (N, D), of images (N, 3, 32, 32) in [0, 1]."""

    def forward(self, images: Tensor) -> Tensor:
        """Scores in (1, 5), float32 (N,), of images (N, 3, 32, 32) in [0, 1]."""
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, 32, 32):
            raise ValueError(f"images must have shape (N, 3, 32, 32), received {tuple(images.shape)}.")
        return 1 + 4 * self.head(self.features(images.float()))[:, 0].sigmoid()
