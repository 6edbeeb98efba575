"""Grids of small images as plain tensors, and images as PNG or data URIs.

Shapes: N images, H height, W width in pixels.
"""

from __future__ import annotations

import base64
import io

import torch
from PIL import Image
from torch import Tensor

_BACKGROUND = 1.0  # white
_LOSSLESS_SIDE = 128  # up to this side a PNG is small and shows single pixels as they are
_LARGEST_SIDE = 512  # larger images are shrunk to this side before they are embedded


def image_grid(images: Tensor, columns: int, *, scale: int = 3, padding: int = 2) -> Tensor:
    """Lay images out row by row on white.

    Args:
        images: float in [0, 1] (values outside are clipped), shape (N, 3, H, W).
        columns: images in a row; fewer if there are fewer images.
        scale: whole factor of the nearest-neighbour enlargement, so that 32 x 32 images can be seen.
        padding: white pixels around every image, in pixels of the result.

    Returns:
        float32 in [0, 1], on the CPU, shape (3, H', W'); empty cells of the last row are white.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[0] == 0:
        raise ValueError(f"images must have shape (N, 3, H, W) with N >= 1, received {tuple(images.shape)}.")
    if columns < 1 or scale < 1 or padding < 0:
        raise ValueError(
            f"columns and scale must be 1 or more and padding 0 or more; received "
            f"columns={columns}, scale={scale}, padding={padding}."
        )
    images = images.detach().to("cpu", torch.float32).clamp(0.0, 1.0)
    images = images.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)
    n, _, height, width = images.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    down, right = height + padding, width + padding
    grid = torch.full((3, rows * down + padding, columns * right + padding), _BACKGROUND)
    for i, image in enumerate(images):
        top, left = padding + (i // columns) * down, padding + (i % columns) * right
        grid[:, top : top + height, left : left + width] = image
    return grid


def before_after(before: Tensor, after: Tensor, columns: int, *, scale: int = 3, padding: int = 2) -> Tensor:
    """Pairs of images, before on the left of after, laid out row by row with a wider gap between pairs.

    Args:
        before: float in [0, 1], shape (N, 3, H, W).
        after: images of the same prompts in the same order, same shape.
        columns: pairs in a row.
        scale: whole factor of the nearest-neighbour enlargement.
        padding: white pixels between the two images of a pair; pairs are three times as far apart.

    Returns:
        float32 in [0, 1], shape (3, H', W').
    """
    if before.shape != after.shape:
        raise ValueError(
            f"before and after must show the same prompts at the same size, received "
            f"{tuple(before.shape)} and {tuple(after.shape)}."
        )
    pairs = [
        image_grid(torch.stack([b, a]), columns=2, scale=scale, padding=padding)
        for b, a in zip(before.cpu(), after.cpu(), strict=True)
    ]
    return image_grid(torch.stack(pairs), columns=columns, scale=1, padding=padding)


def to_png(image: Tensor) -> bytes:
    """Encode one image, float in [0, 1] (values outside are clipped), shape (3, H, W), as PNG."""
    return _encode(_to_pil(image), "PNG")


def to_data_uri(image: Tensor) -> str:
    """Encode one image, float in [0, 1], shape (3, H, W), as a `data:` URI for a self-contained page.

    Small images stay lossless; large ones are shrunk to 512 pixels and stored as JPEG, so that a page of
    many stays a few megabytes.
    """
    picture = _to_pil(image)
    if max(picture.size) <= _LOSSLESS_SIDE:
        kind, data = "png", _encode(picture, "PNG")
    else:
        picture.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE), Image.Resampling.LANCZOS)
        kind, data = "jpeg", _encode(picture, "JPEG", quality=90)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _to_pil(image: Tensor) -> Image.Image:
    if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
        raise ValueError(
            f"An image must be a float tensor in [0, 1] of shape (3, H, W), "
            f"received {image.dtype} {tuple(image.shape)}."
        )
    if not torch.isfinite(image).all():
        raise ValueError("An image has NaN or infinite pixels; find out why before showing it.")
    pixels = (image.detach().float().clamp(0.0, 1.0) * 255.0).round().to("cpu", torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _encode(picture: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, optimize=True, **options)
    return buffer.getvalue()
