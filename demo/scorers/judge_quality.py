"""The judge's sense of quality: a residual network that has seen none of the other networks' damage.

Shapes: N images, C = 3, H = W = 32, D = 4 width features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from demo.scorers.quality import QualityScore
from demo.scorers.residual import residual_trunk


class JudgeQuality(QualityScore):
    """Scores how free of damage images are; trained on `demo.world.judge_damage.spoil` to say 5 - 4 s at severity s.

    Args:
        width: channels at half resolution.
    """

    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.trunk = residual_trunk(width)
        self.head = nn.Sequential(nn.LayerNorm(4 * width), nn.Linear(4 * width, 64), nn.SiLU(), nn.Linear(64, 1))

    @override
    def features(self, images: Tensor) -> Tensor:
        places = self.trunk(images * 2 - 1).flatten(2)
        # The mean tells how much is damaged, the maximum that something is.
        return torch.cat([places.mean(-1), places.amax(-1)], dim=-1)
