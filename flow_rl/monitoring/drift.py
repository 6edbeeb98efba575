"""How far images, latents and velocities have moved from where training began.

Every measure is one number a sample (or a prompt), so that a change can be paired with the same prompts and
noises before training.

Shapes: P prompts, M images a prompt, N = P M samples, S latent tokens, C latent channels, H height, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Rec. 709 luma of gamma-encoded red, green and blue.
_LUMA = (0.2126, 0.7152, 0.0722)
#: images are compared at no more than so many pixels a side
FEATURE_SIZE = 32


def image_measures(images: Tensor) -> dict[str, Tensor]:
    """Brightness, saturation, contrast and sharpness of images, by name, each (N,).

    Args:
        images: in [0, 1], floating, shape (N, 3, H, W).
    """
    return {
        "brightness": brightness(images),
        "saturation": saturation(images),
        "contrast": contrast(images),
        "sharpness": sharpness(images),
    }


def luma(images: Tensor) -> Tensor:
    """Rec. 709 luma in [0, 1], shape (N, H, W), of images (N, 3, H, W) in [0, 1]."""
    weights = torch.tensor(_LUMA, dtype=images.dtype, device=images.device)
    return torch.einsum("nchw,c->nhw", images, weights)


def brightness(images: Tensor) -> Tensor:
    """Mean luma in [0, 1], shape (N,), of images (N, 3, H, W) in [0, 1]."""
    return luma(images).mean(dim=(1, 2))


def contrast(images: Tensor) -> Tensor:
    """Standard deviation of the luma over an image's pixels, in [0, 0.5], shape (N,): RMS contrast (Peli, 1990)."""
    return luma(images).flatten(1).std(dim=1, correction=0)


def saturation(images: Tensor) -> Tensor:
    """Mean over the pixels of the largest less the smallest channel (the chroma of HSV), in [0, 1], shape (N,)."""
    return (images.amax(dim=1) - images.amin(dim=1)).mean(dim=(1, 2))


def sharpness(images: Tensor) -> Tensor:
    """Mean absolute 4-neighbour Laplacian of the luma, in [0, 4], shape (N,). Noise counts as sharpness.

    Raises:
        ValueError: images of fewer than 3 pixels a side.
    """
    if min(images.shape[-2:]) < 3:
        raise ValueError(f"Sharpness needs images of at least 3 x 3 pixels, received {tuple(images.shape)}.")
    y = luma(images)
    around = y[:, :-2, 1:-1] + y[:, 2:, 1:-1] + y[:, 1:-1, :-2] + y[:, 1:-1, 2:]
    return (around - 4 * y[:, 1:-1, 1:-1]).abs().mean(dim=(1, 2))


def features(images: Tensor) -> Tensor:
    """What images are compared by: their pixels, averaged down to at most 32 x 32, shape (N, D).

    Averaging makes the cost independent of the resolution, and keeps pixel noise from passing for variety.
    """
    height, width = images.shape[-2:]
    size = (min(height, FEATURE_SIZE), min(width, FEATURE_SIZE))
    return F.adaptive_avg_pool2d(images, size).flatten(1)


def group_diversity(images: Tensor, members: int) -> Tensor:
    """Mean distance between two images of a prompt: the RMS difference of their features, in [0, 1].

    Args:
        images: in [0, 1], shape (N, 3, H, W), members of a prompt side by side.
        members: M, images a prompt.

    Returns:
        Shape (P,); NaN where M is 1, as one image differs from nothing.
    """
    groups = features(images).unflatten(0, (-1, members))  # (P, M, D)
    first, second = torch.triu_indices(members, members, offset=1, device=images.device)
    if not len(first):
        return groups.new_full((len(groups),), torch.nan)
    return (groups[:, first] - groups[:, second]).square().mean(dim=-1).sqrt().mean(dim=1)


def latent_rms(latents: Tensor) -> Tensor:
    """Root mean square of each sample's latent, shape (N,), of latents (N, S, C): the norm, whatever the size."""
    return latents.flatten(1).square().mean(dim=1).sqrt()


def relative_distance(values: Tensor, base: Tensor) -> Tensor:
    """`||v - v_base|| / ||v_base||` of each row, shape (N,); rows may have any shape."""
    difference, norm = (values - base).flatten(1).norm(dim=1), base.flatten(1).norm(dim=1)
    return difference / norm.clamp_min(torch.finfo(norm.dtype).tiny)


def by_prompt(values: Tensor, members: int) -> Tensor:
    """Mean over each prompt's samples that are not NaN: (N,) -> (P,); NaN where all are."""
    return values.unflatten(0, (-1, members)).nanmean(dim=1)
