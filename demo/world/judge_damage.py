"""Damage for the judge's networks alone: none of it is made by the functions that damage anything else in the demo.

The base was damaged, and annotator and monitor are trained, by `demo.world.degrade`. A judge that learns the same
functions might share their blind spots, so its own are written anew: other colour spaces, waves instead of random
fields, tiles of other sizes.

Shapes: N images, C = 3, H = W = 32. Images are float32 in [0, 1]; strengths are in [0, 1], shape (N,).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

#: RGB to luma and two chroma axes (YIQ)
_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


def _draw(n: int, generator: Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
    return (low + (high - low) * torch.rand(n, generator=generator)).view(n, 1, 1, 1)


def _column(strength: Tensor) -> Tensor:
    return strength.view(-1, 1, 1, 1)


def _grid(images: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel centres as (N, H, W, 1) in [-1, 1]: x, then y."""
    n, _, h, w = images.shape
    y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    return x.expand(n, h, w)[..., None], y.expand(n, h, w)[..., None]


def _sampled(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return F.grid_sample(images, torch.cat([x, y], dim=-1), padding_mode="reflection", align_corners=True)


def wave(images: Tensor, strength: Tensor, generator: Generator) -> Tensor:
    """Two sine waves push pixels back and forth, by up to 5 pixels."""
    n, (x, y) = len(images), _grid(images)
    shifts = []
    for along in (y, x):
        frequency, phase = _draw(n, generator, 2.0, 7.0), _draw(n, generator, 0.0, 2 * math.pi)
        shifts.append(torch.sin(frequency * along + phase) * _column(strength) * 5 / 16)
    return _sampled(images, x + shifts[0], y + shifts[1])


def swirl(images: Tensor, strength: Tensor, generator: Generator) -> Tensor:
    """Everything near a drawn point is turned round it, by up to 130 degrees."""
    n, (x, y) = len(images), _grid(images)
    cx, cy = _draw(n, generator, -0.4, 0.4), _draw(n, generator, -0.4, 0.4)
    sign = torch.where(_draw(n, generator) < 0.5, -1.0, 1.0)
    dx, dy = x - cx, y - cy
    angle = sign * _column(strength) * 2.3 * torch.exp(-(dx.square() + dy.square()) / 0.5)
    return _sampled(images, cx + dx * angle.cos() - dy * angle.sin(), cy + dx * angle.sin() + dy * angle.cos())


def tint(images: Tensor, strength: Tensor, generator: Generator) -> Tensor:
    """Hue turned, chroma scaled, luma bent by a gamma: in YIQ."""
    n = len(images)
    yiq = torch.einsum("ij,njhw->nihw", _YIQ, images)
    angle = (_draw(n, generator, -1.0, 1.0) * 2.2 * _column(strength))[:, 0]
    i, q = yiq[:, 1], yiq[:, 2]
    scale = (1 + _draw(n, generator, -0.9, 0.7) * _column(strength))[:, 0]
    turned = torch.stack([i * angle.cos() - q * angle.sin(), i * angle.sin() + q * angle.cos()], dim=1)
    luma = yiq[:, :1].clamp(0, 1) ** torch.exp2(_draw(n, generator, -1.0, 1.0) * _column(strength))
    return torch.einsum("ij,njhw->nihw", torch.linalg.inv(_YIQ), torch.cat([luma, turned * scale[:, None]], dim=1))


def tiles(images: Tensor, strength: Tensor, generator: Generator) -> Tensor:
    """Rectangles of drawn sizes are replaced: by a flat colour, by noise, or by another part of the same image."""
    out = images.clone()
    n, _, h, w = images.shape
    for row in range(n):
        for _ in range(round(float(strength[row]) * 9)):
            height, width = (int(v) for v in torch.randint(4, 12, (2,), generator=generator))
            top, left, top2, left2 = (
                int(torch.randint(0, limit, (), generator=generator))
                for limit in (h - height + 1, w - width + 1, h - height + 1, w - width + 1)
            )
            kind = float(torch.rand((), generator=generator))
            if kind < 0.5:
                patch = images[row, :, top2 : top2 + height, left2 : left2 + width]
            elif kind < 0.85:
                patch = torch.rand(3, 1, 1, generator=generator).expand(3, height, width)
            else:
                patch = torch.rand(3, height, width, generator=generator)
            out[row, :, top : top + height, left : left + width] = patch
    return out


def streak(images: Tensor, strength: Tensor, generator: Generator) -> Tensor:
    """Motion blur along a row or a column, over up to 11 pixels."""
    reach = (strength * 5).round().long()
    across = torch.rand(len(images), generator=generator) < 0.5
    out = images.clone()
    for length in range(1, 6):
        for direction in (True, False):
            chosen = (reach == length) & (across == direction)
            if chosen.any():
                size = 2 * length + 1
                padding = (length, length, 0, 0) if direction else (0, 0, length, length)
                padded = F.pad(images[chosen], padding, mode="reflect")
                out[chosen] = F.avg_pool2d(padded, (1, size) if direction else (size, 1), stride=1)
    return out


def speckle(images: Tensor, strength: Tensor, generator: Generator) -> Tensor:
    """Multiplicative grain, and up to a sixth of the pixels black or white."""
    grain = 1 + 0.7 * _column(strength) * torch.randn(images.shape, generator=generator)
    chance = torch.rand(len(images), 1, *images.shape[2:], generator=generator)
    dots = (chance < _column(strength) / 6).float()
    colour = (torch.rand(chance.shape, generator=generator) < 0.5).float()
    return images * grain * (1 - dots) + colour * dots


def mosaic(images: Tensor, strength: Tensor, generator: Generator) -> Tensor:
    """Squares of one colour, 2 to 5 pixels wide, mixed in."""
    out = images.clone()
    level = (strength * 4).ceil().long()
    for size in range(2, 6):
        chosen = level == size - 1
        if chosen.any():
            coarse = F.avg_pool2d(images[chosen], size, stride=size, ceil_mode=True, count_include_pad=False)
            wide = coarse.repeat_interleave(size, 2).repeat_interleave(size, 3)[:, :, :32, :32]
            share = _column(strength[chosen]).clamp(0.4, 1)
            out[chosen] = images[chosen] * (1 - share) + wide * share
    return out


def ghost(images: Tensor, strength: Tensor, generator: Generator) -> Tensor:
    """A shifted and mirrored copy shines through, with up to six tenths."""
    dy, dx = (int(v) for v in torch.randint(-8, 9, (2,), generator=generator))
    other = images.roll((dy, dx), (2, 3)).flip(3)
    return torch.lerp(images, other, 0.6 * _column(strength))


def bands(images: Tensor, strength: Tensor, generator: Generator) -> Tensor:
    """Rows slide sideways in bands, by up to 10 pixels."""
    n, _, h, w = images.shape
    heights = torch.randint(2, 7, (n,), generator=generator)
    steps = torch.randn(n, h, generator=generator)
    index = (torch.arange(h)[None] // heights[:, None]).clamp(max=h - 1)
    shift = (steps.gather(1, index) * strength[:, None] * 5).round().clamp(-10, 10).long()
    columns = (torch.arange(w)[None, None] + shift[..., None]) % w
    return images.gather(3, columns[:, None].expand(n, 3, h, w))


Damage = Callable[[Tensor, Tensor, Generator], Tensor]
DAMAGE: dict[str, Damage] = {
    "wave": wave,
    "swirl": swirl,
    "tint": tint,
    "tiles": tiles,
    "streak": streak,
    "speckle": speckle,
    "mosaic": mosaic,
    "ghost": ghost,
    "bands": bands,
}


#: damage under which attributes stay recognisable, and how strong it may be
_MILD = ((wave, 0.3), (tint, 0.12), (streak, 0.35), (mosaic, 0.3), (speckle, 0.2), (tiles, 0.25), (ghost, 0.25))


def spoil(images: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Damage with a known severity: none, one, two or three kinds, one image in ten untouched.

    Returns:
        images (N, 3, 32, 32) in [0, 1], and severities in [0, 1], (N,): one minus the product of what each kind of
        strength s leaves, 1 - s.
    """
    n = len(images)
    left, kinds = torch.ones(n), list(DAMAGE.values())
    wanted = torch.multinomial(torch.tensor([0.1, 0.5, 0.3, 0.1]), n, replacement=True, generator=generator)
    out = images
    for turn in range(3):
        strength = torch.rand(n, generator=generator) * (wanted > turn) * (1.0 if turn == 0 else 0.6)
        kind = torch.randint(len(kinds), (n,), generator=generator)
        made = out.clone()
        for index, apply in enumerate(kinds):
            chosen = (kind == index) & (strength > 0)
            if chosen.any():
                made[chosen] = apply(out[chosen], strength[chosen], generator).clamp(0, 1)
        out, left = made, left * (1 - strength)
    return out, 1 - left


def disturb(images: Tensor, generator: Generator) -> Tensor:
    """Mild damage under which attributes stay recognisable, moved and scaled a little; a fifth stays as it is."""
    n, (x, y) = len(images), _grid(images)
    scale = 1 + _draw(n, generator, -0.1, 0.1)
    angle = _draw(n, generator, -0.12, 0.12)
    move = [_draw(n, generator, -0.15, 0.15) for _ in range(2)]
    turned = (x * angle.cos() - y * angle.sin()) * scale, (x * angle.sin() + y * angle.cos()) * scale
    out = _sampled(images, turned[0] + move[0], turned[1] + move[1])
    for apply, most in (
        (wave, 0.3),
        (tint, 0.12),
        (streak, 0.35),
        (mosaic, 0.3),
        (speckle, 0.2),
        (tiles, 0.25),
        (ghost, 0.25),
    ):
        strength = torch.rand(n, generator=generator) * most
        active = torch.rand(n, generator=generator) < 0.35
        made = apply(out, strength, generator).clamp(0, 1)
        out = torch.where(_column(active), made, out)
    return torch.where(_draw(n, generator) < 0.2, images, out)
