"""The judge's kind of network: strided convolutions, residual blocks, and no pooling inside.

Shapes: N images, C = 3, H = W = 32.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """Two convolutions beside a shortcut.

    Args:
        width: channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Same shape, (N, width, H, W)."""
        return F.silu(x + self.layers(x))


def halved(channels_in: int, channels_out: int) -> nn.Module:
    """Half the resolution, by a convolution that learns what to keep."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.SiLU(),
    )


def residual_trunk(width: int) -> nn.Sequential:
    """Images (N, 3, 32, 32) to (N, 2 width, 4, 4)."""
    w = width
    return nn.Sequential(
        halved(3, w), Residual(w), halved(w, 2 * w), Residual(2 * w), halved(2 * w, 2 * w), Residual(2 * w)
    )
