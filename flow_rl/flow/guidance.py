"""Classifier-free guidance: plain, and with Qwen-Image's norm rescaling.

Shapes: N samples, ... any inner dimensions, C the last one (the channels of packed tokens).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How strongly, and at which noise levels, the conditional velocity is pushed off the unconditional one.

    Guiding only an interval of noise levels saves the unconditional evaluations elsewhere. With few denoising
    steps it is also what keeps policy gradients pointing uphill: every earlier step reaches the image through
    the last step's guided sensitivity, which a strong guidance on a coarse last step turns negative.

    Attributes:
        scale: w in `u + w (c - u)`; 1 is no guidance.
        low: guide where sigma is above this.
        high: guide where sigma is at most this.
        rescale: give the guided velocity the conditional one's norm a token, as Qwen-Image v1 does.
    """

    scale: float
    low: float = 0.0
    high: float = 1.0
    rescale: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.scale < float("inf"):
            raise ValueError(f"guidance scale must be a number from 0 up (1 is no guidance), received {self.scale}.")
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(
                "guidance acts where low < sigma <= high and needs 0 <= low < high <= 1; "
                f"received low={self.low}, high={self.high}."
            )

    def active(self, sigma: float) -> bool:
        """Tell whether a step at noise level `sigma` needs the unconditional velocity at all."""
        return self.scale != 1 and self.low < sigma <= self.high

    def active_rows(self, sigma: Tensor) -> Tensor:
        """As `active` for several noise levels, bool (N,) from float (N,), without bringing them to the host."""
        level = sigma.double()  # as the host compares: 0.6 in float32 lies above 0.6
        return (level > self.low) & (level <= self.high) & (self.scale != 1)


def guide(cond: Tensor, uncond: Tensor, scale: float, *, rescale: bool = False) -> Tensor:
    """Combine the conditional and the unconditional velocity.

    Args:
        cond: conditional velocity c, shape (N, ..., C), any float dtype.
        uncond: unconditional velocity u, same shape.
        scale: w; at 1 the result is c itself, bit for bit.
        rescale: multiply `u + w (c - u)` by `||c|| / ||u + w (c - u)||`, norms over the last dimension.

    Returns:
        `u + w (c - u)`, float32, shape (N, ..., C).

    Raises:
        ValueError: where the shapes differ.
    """
    if cond.shape != uncond.shape:
        raise ValueError(
            "the conditional and the unconditional velocity must have the same shape; received "
            f"{tuple(cond.shape)} and {tuple(uncond.shape)}."
        )
    cond, uncond = cond.float(), uncond.float()
    if scale == 1:
        return cond
    combined = uncond + scale * (cond - uncond)
    if not rescale:
        return combined
    norm = torch.linalg.vector_norm(combined, dim=-1, keepdim=True)
    # A token that guidance cancelled altogether has no direction to rescale: it stays zero.
    norm = norm.clamp_min(torch.finfo(norm.dtype).tiny)
    rescaled: Tensor = combined * (torch.linalg.vector_norm(cond, dim=-1, keepdim=True) / norm)
    return rescaled
