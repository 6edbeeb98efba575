"""What is minimised: policy gradients on recorded steps, DiffusionNFT, and velocity matching.

Every loss is the mean over the rows given. Given `denominator`, it is their sum divided by that number: with
the row count of the whole batch there, the losses of its micro-batches sum to the loss of the whole, and so
do the gradients. Metrics are always means (or maxima) over the rows given, detached.

Everything is computed in float32. "Old", reference and target quantities are constants: detached here.

Shapes: N rows, a row being one (sample, step) pair; ... the latent dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flow.broadcast import as_column, mean_per_row

Metrics = dict[str, Tensor]

_NFT_ERROR_FLOOR = 1e-5


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
    _check_rows(log_prob, log_prob_old=log_prob_old, advantages=advantages, weights=weights)
    log_ratio = log_prob.float() - log_prob_old.detach().float()
    row_losses, metrics = _clipped(log_ratio, advantages.detach().float(), clip_range)
    return _reduce(row_losses, weights, denominator), metrics


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
    _check_rows(log_prob, log_prob_old=log_prob_old, advantages=advantages, weights=weights)
    std, dt = _one_per_row(std, log_prob, "std"), _one_per_row(dt, log_prob, "dt")
    drift = mean_per_row((mean.float() - mean_old.detach().float()).square())
    log_ratio = log_prob.float() - log_prob_old.detach().float() + drift / (2 * std.square())
    row_losses, metrics = _clipped(log_ratio * std, advantages.detach().float(), clip_range)
    return _reduce(row_losses / -dt, weights, denominator), metrics


def nft_loss(
    velocity: Tensor,
    velocity_old: Tensor,
    x_t: Tensor,
    x_0: Tensor,
    sigma: float | Tensor,
    advantages: Tensor,
    *,
    beta: float,
    advantage_max: float,
    velocity_ref: Tensor | None = None,
    kl_weight: float = 0.0,
    denominator: float | None = None,
) -> tuple[Tensor, Metrics]:
    """DiffusionNFT (arXiv 2509.16117): pull towards well-rewarded samples and push from the others.

        v+ = b v + (1-b) v_old,   v- = (1+b) v_old - b v,   r = clip(A, -A_max, A_max) / (2 A_max) + 1/2
        loss = A_max/b (r D(v+) + (1-r) D(v-)) + kl_weight mean_dims((v - v_ref)^2)

    D is measured on `x_0_hat = x_t - sigma v` as the published code does: the mean squared error divided by
    the row's own mean absolute error (a constant, at least 1e-5), which puts all noise levels on one scale.

    Args:
        velocity: v, conditional, of the weights in training, shape (N, ...), with gradient.
        velocity_old: v_old of the sampling policy, shape (N, ...).
        x_t: `(1 - sigma) x_0 + sigma eps` with fresh eps, shape (N, ...).
        x_0: the clean latents that were rewarded, shape (N, ...).
        sigma: noise level of x_t, one number, or one a row, shape (N,).
        advantages: A, shape (N,).
        beta: b, above 0: v+ and v- lie b (v - v_old) to either side of v_old; published: 1.
        advantage_max: A_max above 0; published: 5.
        velocity_ref: v_ref of the weights before training, shape (N, ...); needed where kl_weight > 0.
        kl_weight: published: 1e-4.
        denominator: what to divide the sum by; None is N.

    Returns:
        The loss, and `positive_loss`, `negative_loss` (D of each), `positive_weight` (mean r),
        `old_deviation` (mean (v - v_old)^2), and `kl` where there is a reference.
    """
    _check_rows(advantages)
    _check_same_shape(velocity, velocity_old=velocity_old, x_t=x_t, x_0=x_0, velocity_ref=velocity_ref)
    _check_positive(beta=beta, advantage_max=advantage_max)
    if kl_weight and velocity_ref is None:
        raise ValueError(f"kl_weight={kl_weight} needs velocity_ref; pass it, or set kl_weight to 0.")
    velocity, old = velocity.float(), velocity_old.detach().float()
    x_t, x_0 = x_t.detach().float(), x_0.detach().float()
    level = as_column(sigma, velocity, "sigma").detach()
    positive = _relative_error(x_t - level * (beta * velocity + (1 - beta) * old), x_0)
    negative = _relative_error(x_t - level * ((1 + beta) * old - beta * velocity), x_0)
    r = advantages.detach().float().clamp(-advantage_max, advantage_max) / (2 * advantage_max) + 0.5
    row_losses = advantage_max / beta * (r * positive + (1 - r) * negative)
    metrics = {
        "positive_loss": positive.detach().mean(),
        "negative_loss": negative.detach().mean(),
        "positive_weight": r.mean(),
        "old_deviation": (velocity.detach() - old).square().mean(),
    }
    if velocity_ref is not None:
        kl = mean_per_row((velocity - velocity_ref.detach().float()).square())
        row_losses = row_losses + kl_weight * kl
        metrics["kl"] = kl.detach().mean()
    return _reduce(row_losses, None, denominator), metrics


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
    _check_same_shape(velocity, velocity_target=velocity_target)
    target = velocity_target.detach().float()
    row_losses = mean_per_row((velocity.float() - target).square())
    if weights is not None:
        _check_rows(row_losses, weights=weights)
    scale = target.square().mean().clamp_min(torch.finfo(torch.float32).tiny)
    metrics = {"relative_error": (row_losses.detach().mean() / scale).sqrt()}
    return _reduce(row_losses, weights, denominator), metrics


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
    _check_same_shape(mean, mean_ref=mean_ref)
    squared = mean_per_row((mean.float() - mean_ref.detach().float()).square())
    return squared / (2 * _one_per_row(std, squared, "std").square())


def _clipped(log_ratio: Tensor, advantages: Tensor, clip_range: float) -> tuple[Tensor, Metrics]:
    """The clipped surrogate a row, and the statistics of its ratio."""
    _check_positive(clip_range=clip_range)
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


def _relative_error(x_0_hat: Tensor, x_0: Tensor) -> Tensor:
    """Mean squared error a row over the row's own mean absolute error."""
    difference = x_0_hat - x_0
    scale = mean_per_row(difference.detach().abs()).clamp_min(_NFT_ERROR_FLOOR)
    return mean_per_row(difference.square()) / scale


def _reduce(row_losses: Tensor, weights: Tensor | None, denominator: float | None) -> Tensor:
    if weights is not None:
        row_losses = row_losses * weights.detach().float()
    if denominator is None:
        return row_losses.mean()
    _check_positive(denominator=denominator)
    return row_losses.sum() / denominator


def _one_per_row(value: float | Tensor, rows: Tensor, name: str) -> Tensor:
    """A number a row, shape (N,) or (); accepts a transition's (N, 1, ..., 1) std."""
    if isinstance(value, Tensor):
        value = value.detach().reshape(-1) if value.numel() > 1 else value.detach().reshape(())
    return as_column(value, rows, name)


def _check_rows(first: Tensor, **others: Tensor | None) -> None:
    """All must have shape (N,): (N, 1) beside (N,) would broadcast to an N x N loss without a word."""
    if first.ndim != 1:
        raise ValueError(f"Expected one value a row, shape (N,); received shape {tuple(first.shape)}.")
    _check_same_shape(first, **others)


def _check_same_shape(first: Tensor, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is not None and other.shape != first.shape:
            raise ValueError(f"{name} must have shape {tuple(first.shape)}, received {tuple(other.shape)}.")


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be above 0, received {value}.")
