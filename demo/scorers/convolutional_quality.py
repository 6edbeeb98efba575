"""Annotator's and monitor's sense of quality: a small convolutional network.

Shapes: N images, C = 3, H = W = 32, D features.
"""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import override

from demo.scorers.convolutional import convolution, stages
from demo.scorers.quality import QualityScore


class ConvolutionalQuality(QualityScore):
    """Annotator's and monitor's: the score of a render corrupted with severity s is trained to be 5 - 4 s.

    The corruptions are those of ``demo.world.degrade.corrupt``.

    Args:
        width: channels of the first convolution.
    """

    def __init__(self, *, width: int) -> None:
        super().__init__()
        w = width
        layers: list[nn.Module] = []
        for channels_in, channels_out in stages(w):
            layers += [*convolution(channels_in, channels_out), nn.MaxPool2d(2)]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(12 * w, 64), nn.ReLU())
        self.head = nn.Linear(64, 1)

    @override
    def features(self, images: Tensor) -> Tensor:
        return self.trunk((images - 0.5) * 4)
