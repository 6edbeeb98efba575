"""Inputs of a forward, made on the device from what the host knows: nothing is copied and nobody waits.

A tensor that is made on the CPU and then copied, or an index that is a list, makes the host wait until the device has
finished all earlier work.

Shapes: N samples, P distinct prompts, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor


def a_sample(sigma: float | Tensor, latents: Tensor) -> Tensor:
    """Noise levels of N samples, float32 (N,), on the latents' device.

    Args:
        sigma: one level for all samples, or a tensor of one or N.
        latents: of N samples.
    """
    samples, device = latents.shape[0], latents.device
    if isinstance(sigma, Tensor) and (sigma.ndim or sigma.device.type != "cpu"):
        return sigma.to(device=device, dtype=torch.float32).expand(samples)
    return torch.full((samples,), float(sigma), dtype=torch.float32, device=device)


def samples_of(values: Tensor, rows: Sequence[int]) -> Tensor:
    """`values[rows]`, for rows that are known on the host: a view where they are all the same.

    Args:
        values: of P prompts, shape (P, ...).
        rows: which prompt each of N samples belongs to.

    Returns:
        Shape (N, ...).
    """
    if len(set(rows)) == 1:
        return values[rows[0]].expand(len(rows), *values.shape[1:])
    return torch.stack([values[row] for row in rows])


def mask_on(device: torch.device, mask: Sequence[bool]) -> Tensor:
    """A mask (L,) on a device, one fill for each run of True."""
    made, end = torch.zeros(len(mask), dtype=torch.bool, device=device), 0
    for value, run in groupby(mask):
        start, end = end, end + len(list(run))
        if value:
            made[start:end] = True
    return made


def valid_tokens(lengths: Sequence[int], device: torch.device) -> Tensor | None:
    """Bool (N, L), False at the padding on the right; None where there is none.

    Args:
        lengths: tokens of each of N samples; L is the longest.
        device: of the mask.
    """
    longest = max(lengths)
    if min(lengths) == longest:
        return None
    made = torch.ones(len(lengths), longest, dtype=torch.bool, device=device)
    for row, length in zip(made, lengths, strict=True):
        row[length:] = False
    return made
