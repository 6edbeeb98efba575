"""Degradations of images: to imitate an imperfect generator, and to have a known severity.

The first kind trains verifiers, the second the quality score.

Shapes: N images, C = 3, H = W = 32, in 16 patches of 8 x 8.
Images are float32 in [0, 1]; strengths are in [0, 1], shape (N,).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

_PATCH = 8
_BLUR_SIGMAS = (0.0, 0.35, 0.55, 0.8, 1.1, 1.5, 2.0, 2.6)


def _uniform(n: int, generator: Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(n, generator=generator)


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


@cache
def _blur_kernel(sigma: float) -> Tensor:
    radius = math.ceil(2.5 * sigma)
    x = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    return kernel / kernel.sum()


def blur(images: Tensor, strength: Tensor) -> Tensor:
    """Gaussian blur, sigma 0 to 2.6 pixels in eight steps, edges replicated."""
    level = (strength * (len(_BLUR_SIGMAS) - 1)).round().long()
    out = images.clone()
    for index, sigma in enumerate(_BLUR_SIGMAS):
        chosen = level == index
        if index == 0 or not chosen.any():
            continue
        kernel = _blur_kernel(sigma)
        radius = len(kernel) // 2
        x = F.pad(images[chosen].flatten(0, 1)[:, None], (radius,) * 4, mode="replicate")
        x = F.conv2d(F.conv2d(x, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
        out[chosen] = x.view(-1, *images.shape[1:])
    return out


def noise(images: Tensor, strength: Tensor, generator: Generator) -> Tensor:
    """White noise of standard deviation 0 to 0.25, half of the images with it smoothed to blotches."""
    white = torch.randn(images.shape, generator=generator)
    blotches = F.interpolate(F.avg_pool2d(white, 2) * 2, scale_factor=2, mode="bilinear", align_corners=False)
    smooth = _per_image(_uniform(len(images), generator) < 0.5)
    return images + 0.25 * _per_image(strength) * torch.where(smooth, blotches, white)


def low_resolution(images: Tensor, strength: Tensor) -> Tensor:
    """Down to 32, 24, 16, 12 or 8 pixels and up again."""
    sizes = (32, 24, 16, 12, 8)
    level = (strength * (len(sizes) - 1)).round().long()
    out = images.clone()
    for index, size in enumerate(sizes[1:], start=1):
        chosen = level == index
        if chosen.any():
            small = F.interpolate(images[chosen], size=size, mode="area")
            out[chosen] = F.interpolate(small, size=images.shape[-1], mode="bilinear", align_corners=False)
    return out


@cache
def _dct(size: int) -> Tensor:
    k, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    basis = torch.cos(math.pi * (x + 0.5) * k / size) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis.float()


def quantize_patches(images: Tensor, strength: Tensor) -> Tensor:
    """Coarse frequencies in 8 x 8 patches, as JPEG and patch autoencoders leave them: ringing and steps."""
    n, c, h, w = images.shape
    basis = _dct(_PATCH)
    blocks = images.view(n, c, h // _PATCH, _PATCH, w // _PATCH, _PATCH).transpose(3, 4)
    frequency = torch.arange(_PATCH).float()
    step = (0.02 + 0.5 * strength).view(-1, 1, 1, 1, 1, 1) * (1 + frequency[:, None] + frequency[None, :]) / 4
    step[..., 0, 0] *= 0.25  # patch means survive better than detail
    coefficients = basis @ blocks @ basis.T
    kept = torch.where(strength.view(-1, 1, 1, 1, 1, 1) > 0, (coefficients / step).round() * step, coefficients)
    return (basis.T @ kept @ basis).transpose(3, 4).reshape(n, c, h, w)


def shift_palette(images: Tensor, strength: Tensor, generator: Generator) -> Tensor:
    """Colours leave the palette: faded or over-saturated, a gain and an offset a channel."""
    n = len(images)
    grey = images.mean(dim=1, keepdim=True)
    direction = torch.where(_uniform(n, generator) < 0.6, -0.8, 0.6)
    saturated = grey + (images - grey) * _per_image(1 + strength * direction)
    gain = 1 + 0.35 * _per_image(strength) * (2 * torch.rand(n, 3, 1, 1, generator=generator) - 1)
    offset = 0.2 * _per_image(strength) * (2 * torch.rand(n, 3, 1, 1, generator=generator) - 1)
    return saturated * gain + offset


def break_patches(images: Tensor, strength: Tensor, generator: Generator) -> Tensor:
    """Up to 10 of the 16 patches are flat, or come from another place of the image."""
    n, c, h, w = images.shape
    rows, columns = h // _PATCH, w // _PATCH
    patches = images.view(n, c, rows, _PATCH, columns, _PATCH).permute(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(n, rows * columns, c, _PATCH, _PATCH)
    order = torch.rand(n, rows * columns, generator=generator).argsort(dim=1)
    broken = order.argsort(dim=1) < (strength * 10).round()[:, None]
    moved = patches[torch.arange(n)[:, None], order]
    flat = patches.mean(dim=(3, 4), keepdim=True).expand_as(patches)
    use_flat = (torch.rand(n, rows * columns, generator=generator) < 0.4).view(n, -1, 1, 1, 1)
    mixed = torch.where(broken.view(n, -1, 1, 1, 1), torch.where(use_flat, flat, moved), patches)
    mixed = mixed.view(n, rows, columns, c, _PATCH, _PATCH).permute(0, 3, 1, 4, 2, 5)
    return mixed.reshape(n, c, h, w)


def warp(images: Tensor, strength: Tensor, generator: Generator) -> Tensor:
    """Smooth random displacements of up to 5 pixels."""
    n = len(images)
    coarse = torch.randn(n, 2, 5, 5, generator=generator) * _per_image(strength) * 5 / 16 / 1.5
    field = F.interpolate(coarse, size=images.shape[-2:], mode="bicubic", align_corners=True)
    identity = F.affine_grid(torch.eye(2, 3).expand(n, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, identity + field.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)


def _sometimes(images: Tensor, degraded: Tensor, probability: float, generator: Generator) -> Tensor:
    return torch.where(_per_image(_uniform(len(images), generator) < probability), degraded, images)


def imitate_generator(images: Tensor, generator: Generator) -> Tensor:
    """Mild random degradations as a generator makes them, of which attributes stay recognisable.

    A quarter of the images stays clean; the others are moved, bent, coarsened, recoloured and made noisy at
    random.
    """
    n = len(images)
    shifted = F.pad(images, (2, 2, 2, 2), mode="replicate")
    dy, dx = (torch.randint(0, 5, (n,), generator=generator) for _ in range(2))
    rows = (torch.arange(32)[None] + dy[:, None]).view(n, 1, 32, 1).expand(n, 3, 32, 36)
    columns = (torch.arange(32)[None] + dx[:, None]).view(n, 1, 1, 32).expand(n, 3, 32, 32)
    x = _sometimes(images, shifted.gather(2, rows).gather(3, columns), 0.4, generator)
    x = _sometimes(x, warp(x, _uniform(n, generator, 0, 0.35), generator), 0.4, generator)
    x = _sometimes(x, low_resolution(x, _uniform(n, generator, 0, 0.6)), 0.25, generator)
    x = _sometimes(x, blur(x, _uniform(n, generator, 0, 0.5)), 0.4, generator)
    x = _sometimes(x, shift_palette(x, _uniform(n, generator, 0, 0.3), generator), 0.4, generator)
    x = _sometimes(x, quantize_patches(x, _uniform(n, generator, 0, 0.5)), 0.4, generator)
    x = _sometimes(x, noise(x, _uniform(n, generator, 0, 0.35), generator), 0.5, generator)
    return _sometimes(x, images, 0.25, generator).clamp(0, 1)


Corruption = Callable[[Tensor, Tensor, Generator], Tensor]
CORRUPTIONS: dict[str, Corruption] = {
    "blur": lambda x, s, g: blur(x, s),
    "noise": noise,
    "low_resolution": lambda x, s, g: low_resolution(x, s),
    "quantize": lambda x, s, g: quantize_patches(x, s),
    "palette": shift_palette,
    "patches": break_patches,
    "warp": warp,
}


def corrupt(images: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Corrupt with a known severity.

    Each image gets none, one or two kinds of corruption of drawn strengths; one in 16 stays untouched.

    Returns:
        images (N, 3, 32, 32) in [0, 1] and severities in [0, 1], shape (N,): ``1 - (1 - s_1)(1 - s_2)`` of
        the strengths, 0 for an untouched image.
    """
    n = len(images)
    x, clean = images, torch.ones(n)
    for chance in (7 / 8, 1 / 2):
        active = (_uniform(n, generator) < chance) & (clean < 1 if chance == 1 / 2 else torch.ones(n, dtype=bool))
        kind = torch.randint(len(CORRUPTIONS), (n,), generator=generator)
        strength = _uniform(n, generator) * active
        strength = (strength * 40).round() / 40  # grades
        out = x.clone()
        for index, apply in enumerate(CORRUPTIONS.values()):
            chosen = (kind == index) & (strength > 0)
            if chosen.any():
                out[chosen] = apply(x[chosen], strength[chosen], generator)
        x, clean = out.clamp(0, 1), clean * (1 - strength)
    return x, 1 - clean
