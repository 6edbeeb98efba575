"""Images as tensors in [0, 1] and as bytes.

Shapes: N images, H height, W width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_uint8(images: Tensor) -> np.ndarray:
    """Round images in [0, 1], (N, 3, H, W), to uint8 arrays (N, H, W, 3)."""
    scaled = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def from_uint8(images: np.ndarray) -> Tensor:
    """Float32 images in [0, 1], (N, 3, H, W), from uint8 arrays (N, H, W, 3)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255).contiguous()


def to_rgba(images: Tensor) -> Tensor:
    """The input (N, 4, 1, H, W) in [-1, 1] of Qwen-Image 2.1's VAE from opaque images (N, 3, H, W) in [0, 1]."""
    return torch.cat([images, torch.ones_like(images[:, :1])], dim=1)[:, :, None] * 2 - 1
