"""The convolutions that annotator and monitor are made of."""

from __future__ import annotations

from torch import nn


def stages(width: int) -> tuple[tuple[int, int], ...]:
    """Channels into and out of each convolution."""
    w = width
    return (3, w), (w, 2 * w), (2 * w, 3 * w), (3 * w, 3 * w)


def convolution(channels_in: int, channels_out: int) -> list[nn.Module]:
    """A normalised 3 x 3 convolution that keeps the resolution."""
    return [
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    ]
