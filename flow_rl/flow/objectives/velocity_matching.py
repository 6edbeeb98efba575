"""Flow matching, and on-policy distillation.

Shapes: N rows, a row being one (sample, step) pair; ... the latent dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flow_rl.flow.broadcast import mean_per_row
from flow_rl.flow.objectives.rows import Metrics, check_rows, check_same_shape, reduce_rows


def velocity_matching_loss(
    velocity: Tensor,
    velocity_target: Tensor,
    *,
    weights: Tensor | None = None,
    denominator: float | None = None,
) -> tuple[Tensor, Metrics]:
    """Mean squared difference of velocities: flow matching, and on-policy distillation (arXiv 2606.27608).

    Args:
        velocity: of the weights in training, shape (N, ...), with gradient.
        velocity_target: `eps - x_0`, or the teacher's guided velocity at the same state, shape (N, ...).
        weights: factor on each row's loss, shape (N,).
        denominator: what to divide the sum over rows by; None is N.

    Returns:
        The loss, and `relative_error`: the RMS difference over the RMS of the target.
    """
    check_same_shape(velocity, velocity_target=velocity_target)
    target = velocity_target.detach().float()
    row_losses = mean_per_row((velocity.float() - target).square())
    if weights is not None:
        check_rows(row_losses, weights=weights)
    scale = target.square().mean().clamp_min(torch.finfo(torch.float32).tiny)
    metrics = {"relative_error": (row_losses.detach().mean() / scale).sqrt()}
    return reduce_rows(row_losses, weights, denominator), metrics
