"""Two helpers every formula needs: put a scalar beside a batch, and average all but the batch.

Shapes: B rows, ... any non-batch dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def as_column(value: float | Tensor, like: Tensor, name: str) -> Tensor:
    """Shape a per-batch or per-row quantity so that it broadcasts against `like`.

    Args:
        value: a number or 0-d tensor (the same for all rows), or one number a row, shape (B,).
        like: the batch it will meet, shape (B, ...).
        name: what to call it in an error.

    Returns:
        float32 on the device of `like`: 0-d for a single number, (B, 1, ..., 1) for one a row.

    Raises:
        ValueError: for any other shape.
    """
    if not isinstance(value, Tensor):
        # A fill, unlike a copy from the host, does not wait for the accelerator.
        return torch.full((), value, dtype=torch.float32, device=like.device)
    value = value.to(device=like.device, dtype=torch.float32)
    if value.ndim == 0:
        return value
    if value.shape != like.shape[:1]:
        raise ValueError(
            f"{name} must be one number, or one a row with shape ({like.shape[0]},), "
            f"to go with a batch of shape {tuple(like.shape)}; received shape {tuple(value.shape)}."
        )
    return value.view(-1, *([1] * (like.ndim - 1)))


def mean_per_row(x: Tensor) -> Tensor:
    """Average over every dimension but the first: (B, ...) -> (B,)."""
    return x.flatten(1).mean(dim=1) if x.ndim > 1 else x
