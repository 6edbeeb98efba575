"""Policy gradients on recorded stochastic steps, and what keeps them near a reference.

Shapes: N rows, a row being one (sample, step) pair; ... the latent dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flow_rl.flow.broadcast import mean_per_row
from flow_rl.flow.objectives.rows import Metrics, check_positive, check_rows, check_same_shape, one_per_row, reduce_rows


def clipped_policy_loss(
    log_prob: Tensor,
    log_prob_old: Tensor,
    advantages: Tensor,
    *,
    clip_range: float,
    weights: Tensor | None = None,
    denominator: float | None = None,
) -> tuple[Tensor, Metrics]:
    """Clipped policy gradient of Flow-GRPO: `max(-A ratio, -A clip(ratio, 1-e, 1+e))`.

    Both log-probabilities must be of the stored x_next under the CONDITIONAL velocity, also where the rollout
    was guided: the guided sampler's own density as "old" biases the ratio.

    Args:
        log_prob: under the weights in training, shape (N,), with gradient.
        log_prob_old: under the weights that are the baseline of the ratio, shape (N,).
        advantages: shape (N,).
        clip_range: e, above 0. The log-probabilities are means over dimensions, so useful values are small
            (1e-5 to 1e-4).
        weights: factor on each row's loss, shape (N,), such as the step weights of TempFlow-GRPO.
        denominator: what to divide the sum by; None is N.

    Returns:
        The loss, and the ratio's statistics: `ratio_mean`, `ratio_deviation_max` (of |ratio - 1|),
        `clip_fraction_low`, `clip_fraction_high`, `clip_fraction` (rows whose gradient clipping removed),
        `approx_kl` (mean of ratio - 1 - log ratio).
    """
    check_rows(log_prob, log_prob_old=log_prob_old, advantages=advantages, weights=weights)
    log_ratio = log_prob.float() - log_prob_old.detach().float()
    row_losses, metrics = _clipped(log_ratio, advantages.detach().float(), clip_range)
    return reduce_rows(row_losses, weights, denominator), metrics


def guarded_policy_loss(
    log_prob: Tensor,
    log_prob_old: Tensor,
    advantages: Tensor,
    *,
    mean: Tensor,
    mean_old: Tensor,
    std: float | Tensor,
    dt: float | Tensor,
    clip_range: float,
    weights: Tensor | None = None,
    denominator: float | None = None,
) -> tuple[Tensor, Metrics]:
    """GRPO-Guard (arXiv 2510.22319): the ratio re-centred and put on one scale at every noise level.

        log ratio' = (log_prob - log_prob_old + mean_dims((mean - mean_old)^2) / (2 std^2)) std
        loss       = max(-A ratio', -A clip(ratio', 1-e, 1+e)) / (-dt)

    The added term cancels what makes a log-ratio negative on average, so that clipping acts on both sides.

    Args:
        log_prob: under the weights in training, shape (N,), with gradient; a Gaussian's, so not of `cps`.
        log_prob_old: under the baseline weights, shape (N,).
        advantages: shape (N,).
        mean: the transition's mean under the weights in training, shape (N, ...), with gradient.
        mean_old: the same under the baseline weights, shape (N, ...).
        std: the transition's std, `sqrt(-dt)` included: one number, or one a row.
        dt: sigma_next - sigma, below 0: one number, or one a row, shape (N,).
        clip_range: e, above 0; published: 2e-6.
        weights: factor on each row's loss, shape (N,).
        denominator: what to divide the sum by; None is N.

    Returns:
        The loss, and the metrics of `clipped_policy_loss` for the re-centred ratio.
    """
    check_rows(log_prob, log_prob_old=log_prob_old, advantages=advantages, weights=weights)
    std, dt = one_per_row(std, log_prob, "std"), one_per_row(dt, log_prob, "dt")
    drift = mean_per_row((mean.float() - mean_old.detach().float()).square())
    log_ratio = log_prob.float() - log_prob_old.detach().float() + drift / (2 * std.square())
    row_losses, metrics = _clipped(log_ratio * std, advantages.detach().float(), clip_range)
    return reduce_rows(row_losses / -dt, weights, denominator), metrics


def kl_to_reference(mean: Tensor, mean_ref: Tensor, std: float | Tensor) -> Tensor:
    """KL divergence, a dimension, between two transitions of equal std.

        KL = mean_dims((mean - mean_ref)^2) / (2 std^2)

    Flow-GRPO's published coefficients (0.04, 0.01) go with `s = std / sqrt(-dt)` in place of std: pass that
    to reproduce them.

    Args:
        mean: of the weights in training, shape (N, ...), with gradient.
        mean_ref: of the reference, shape (N, ...).
        std: above 0; one number, or one a row.

    Returns:
        float32, shape (N,).
    """
    check_same_shape(mean, mean_ref=mean_ref)
    squared = mean_per_row((mean.float() - mean_ref.detach().float()).square())
    return squared / (2 * one_per_row(std, squared, "std").square())


def step_weights(std: Tensor) -> Tensor:
    """TempFlow-style weights of the trained steps (arXiv 2508.04324): a step's own noise over the mean of all.

        weight_k = std_k / mean_k(std),   std = s sqrt(-dt)

    The gradient of a Gaussian log-density grows as 1 / std, so that plain sums favour the steps with the least
    noise, which shape the image least. The weights undo that; their mean is 1.

    Args:
        std: noise that each trained step adds, above 0, shape (K,).

    Returns:
        float32, shape (K,).

    Raises:
        ValueError: for a step without noise, or no step.
    """
    if std.ndim != 1 or not std.numel() or not bool((std > 0).all()):
        raise ValueError(f"step_weights needs the std of one or more stochastic steps, shape (K,); received {std}.")
    std = std.detach().float()
    return std / std.mean()


def _clipped(log_ratio: Tensor, advantages: Tensor, clip_range: float) -> tuple[Tensor, Metrics]:
    """The clipped surrogate a row, and the statistics of its ratio."""
    check_positive(clip_range=clip_range)
    ratio = torch.exp(log_ratio)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    row_losses = torch.maximum(-advantages * ratio, -advantages * clipped)
    with torch.no_grad():
        low = ((advantages < 0) & (ratio < 1 - clip_range)).float().mean()
        high = ((advantages > 0) & (ratio > 1 + clip_range)).float().mean()
        metrics = {
            "ratio_mean": ratio.mean(),
            "ratio_deviation_max": (ratio - 1).abs().max(),
            "clip_fraction": low + high,
            "clip_fraction_low": low,
            "clip_fraction_high": high,
            "approx_kl": (torch.expm1(log_ratio) - log_ratio).mean(),
        }
    return row_losses, metrics
