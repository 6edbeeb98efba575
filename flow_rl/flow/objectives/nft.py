"""DiffusionNFT: forward-process matching towards well-rewarded samples.

Shapes: N rows, a row being one (sample, step) pair; ... the latent dimensions.
"""

from __future__ import annotations

from torch import Tensor

from flow_rl.flow.broadcast import as_column, mean_per_row
from flow_rl.flow.objectives.rows import Metrics, check_positive, check_rows, check_same_shape, reduce_rows

_NFT_ERROR_FLOOR = 1e-5


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
    weights: Tensor | None = None,
    denominator: float | None = None,
) -> tuple[Tensor, Metrics]:
    """DiffusionNFT (arXiv 2509.16117): pull towards well-rewarded samples and push from the others.

        v+ = b v + (1-b) v_old,   v- = (1+b) v_old - b v,   r = clip(A, -A_max, A_max) / (2 A_max) + 1/2
        loss = A_max/b (r D(v+) + (1-r) D(v-)) + kl_weight mean_dims((v - v_ref)^2)

    D is measured on `x_0_hat = x_t - sigma v` as the published code does: the mean squared error divided by
    the row's own mean absolute error (a constant, at least 1e-5), which puts all noise levels on one scale.

    A row of advantage 0 is not silent: where v differs from v_old, its gradient pulls back to v_old. A row that must
    teach nothing needs weight 0.

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
        weights: factor on each row's loss, `kl` included, shape (N,).
        denominator: what to divide the sum by; None is N.

    Returns:
        The loss, and `positive_loss`, `negative_loss` (D of each), `positive_weight` (mean r),
        `old_deviation` (mean (v - v_old)^2), and `kl` where there is a reference.
    """
    check_rows(advantages, weights=weights)
    check_same_shape(velocity, velocity_old=velocity_old, x_t=x_t, x_0=x_0, velocity_ref=velocity_ref)
    check_positive(beta=beta, advantage_max=advantage_max)
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
    return reduce_rows(row_losses, weights, denominator), metrics


def _relative_error(x_0_hat: Tensor, x_0: Tensor) -> Tensor:
    """Mean squared error a row over the row's own mean absolute error."""
    difference = x_0_hat - x_0
    scale = mean_per_row(difference.detach().abs()).clamp_min(_NFT_ERROR_FLOOR)
    return mean_per_row(difference.square()) / scale
