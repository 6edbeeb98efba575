"""What every reward that looks at pixels needs first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def finite_images(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images to look at, and which of them can be looked at.

    Args:
        images: (N, 3, H, W), any floating type, any device.

    Returns:
        images as float32 on the CPU, clamped to [0, 1], non-finite values blanked, shape (N, 3, H, W); and bool
        (N,), False for an image that had a non-finite value: its score must be NaN.
    """
    images = images.detach().to("cpu", torch.float32)
    finite = images.flatten(1).isfinite().all(dim=1)
    return images.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(0, 1), finite


def quantise(images: Tensor) -> Tensor:
    """Float images in [0, 1], shape (N, 3, H, W), to uint8 on the CPU; outside the range they are clipped.

    Not-a-number has no 8-bit value: the caller keeps such images out.
    """
    return (images.detach().to(torch.float32).clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def dequantise(images: Tensor | Sequence[Tensor]) -> Tensor:
    """Uint8 images to float32 in [0, 1]: undoes `quantise` exactly for images that have 8 bits to begin with.

    Args:
        images: (N, 3, H, W), or N times (3, H, W).
    """
    # Image by image, so that nothing but the result is as large as the result.
    found = torch.empty((len(images), *images[0].shape), dtype=torch.float32, device=images[0].device)
    for image, floats in zip(images, found, strict=True):
        torch.div(image, 255, out=floats)
    return found
