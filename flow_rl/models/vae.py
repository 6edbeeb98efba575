"""Single images through the VAEs of Qwen-Image: both families' classes are made for videos.

Their own `encode` and `decode` keep a copy of every convolution's input for the next frame. A single image has no next
frame, so the submodules are called here without that feature cache. The result has the same bits; for 4 megapixels it
takes 27 GB instead of 51 GB (Qwen-Image 2.1, float32).

Shapes: N images, C latent channels, H and W in pixels, h and w in latent pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import AutoencoderKLQwenImage, AutoencoderKLQwenImage21

    Autoencoder: TypeAlias = AutoencoderKLQwenImage | AutoencoderKLQwenImage21

#: pixels the VAE takes at a time; one image of 1024 x 1024 needs about 7 GB of feature maps
VAE_PIXELS = 1024 * 1024


def encode_frame(vae: Autoencoder, pixels: Tensor) -> Tensor:
    """The mode of the posterior of single images, as `vae.encode(pixels).latent_dist.mode()`.

    Args:
        vae: of either family; tiling and slicing that it has switched on are ignored.
        pixels: shape (N, 3, 1, H, W) in [-1, 1]; four channels for Qwen-Image 2.1.

    Returns:
        Shape (N, C, 1, h, w), not normalised.
    """
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage21 import _patchify

    _check_single_frame(pixels)
    patch_size = vae.config.get("patch_size")
    if patch_size is not None:
        pixels = _patchify(pixels, patch_size=patch_size)
    mean: Tensor
    mean, _log_variance = vae.quant_conv(vae.encoder(pixels)).chunk(2, dim=1)
    return mean


def decode_frame(vae: Autoencoder, latents: Tensor) -> Tensor:
    """Single images from latents, as `vae.decode(latents).sample`.

    Args:
        vae: of either family; tiling and slicing that it has switched on are ignored.
        latents: shape (N, C, 1, h, w), not normalised.

    Returns:
        Shape (N, 3, 1, H, W) in [-1, 1]; four channels for Qwen-Image 2.1.
    """
    from diffusers import AutoencoderKLQwenImage21
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage21 import _unpatchify

    _check_single_frame(latents)
    # The residual shortcut of 2.1 doubles frames along with pixels, except for the first frame.
    first = {"first_chunk": True} if isinstance(vae, AutoencoderKLQwenImage21) else {}
    images: Tensor = vae.decoder(vae.post_quant_conv(latents), **first)
    patch_size = vae.config.get("patch_size")
    if patch_size is not None:
        images = _unpatchify(images, patch_size=patch_size)
    return images.clamp(-1, 1)


def in_chunks(function: Callable[[Tensor], Tensor], batch: Tensor, size: tuple[int, int]) -> Tensor:
    """Apply a function to a batch of images, `VAE_PIXELS` at a time but at least one image.

    Args:
        function: maps some of the rows to as many rows.
        batch: images or their latents, N rows.
        size: height and width of the images in pixels.
    """
    rows = max(1, VAE_PIXELS // math.prod(size))
    return torch.cat([function(chunk) for chunk in batch.split(rows)])


def _check_single_frame(frames: Tensor) -> None:
    if frames.ndim != 5 or frames.shape[2] != 1:
        raise ValueError(
            f"Expected single images, shape (N, channels, 1, height, width); received {tuple(frames.shape)}."
        )
