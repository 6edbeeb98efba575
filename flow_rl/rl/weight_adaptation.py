"""Weights that move slowly towards the rewards with headroom, and never far from the table a person wrote.

For one row with table weights w0, weights w and mean scores m on the 1..5 scale:

    target_k = w0_k (5 - m_k) / sum_j w0_j (5 - m_j)
    w <- projection of w + rate (target - w) on { w >= 0, sum w = 1, |w_k - w0_k| <= radius, w_k = 0 where w0_k = 0 }

Everything is float64 and deterministic.

Shapes: C rows, K rewards.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flow_rl.rewards.base import SCORE_MAX

#: halvings of the projection's interval: from 2 down to below float64's spacing at 1
_HALVINGS = 60


@dataclass(frozen=True, kw_only=True)
class AdaptationSettings:
    """How the weights of a run move."""

    rate: float = 0.02
    """Share of the way to the target that an iteration goes."""
    radius: float = 0.1
    """The trust region: how far each weight may get from the table's."""
    smoothing: float = 0.9
    """Share of the old mean score that stays when an iteration brings a new one, in [0, 1)."""

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(f"adapt.rate is {self.rate}; it must lie in (0, 1].")
        if not 0 < self.radius <= 1:
            raise ValueError(
                f"adapt.radius is {self.radius}; it must lie in (0, 1]. Leave adapt out for fixed weights."
            )
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"adapt.smoothing is {self.smoothing}; it must lie in [0, 1).")


def smoothed_means(means: Tensor, sums: Tensor, counts: Tensor, smoothing: float) -> Tensor:
    """Running mean scores; NaN until the first score is seen.

    Args:
        means: so far, NaN where nothing was seen, shape (C, K).
        sums: of this iteration's scores, shape (C, K).
        counts: of this iteration's scores, shape (C, K).
        smoothing: share of the old mean that stays.
    """
    new = sums / counts
    blended = torch.where(means.isnan(), new, smoothing * means + (1 - smoothing) * new)
    return torch.where(counts > 0, blended, means)


def adapted(weights: Tensor, table: Tensor, means: Tensor, settings: AdaptationSettings) -> Tensor:
    """One move of every row whose rewards have all been seen.

    Args:
        weights: in force, float64 (C, K).
        table: as configured, float64 (C, K).
        means: mean scores, NaN where not seen yet, float64 (C, K).
        settings: of the move.

    Returns:
        float64 (C, K).
    """
    pull = table * (SCORE_MAX - means).clamp_min(0)
    # a reward that is switched off need not have been seen
    pull = torch.where(table == 0, 0.0, pull)
    total = pull.sum(dim=1, keepdim=True)
    moves = (total > 0).squeeze(1)  # false, too, where a mean is still NaN
    moved = weights.clone()
    target = pull[moves] / total[moves]
    step = weights[moves] + settings.rate * (target - weights[moves])
    moved[moves] = project(step, table[moves], settings.radius)
    return moved


def project(points: Tensor, centres: Tensor, radius: float) -> Tensor:
    """The nearest weights (Euclidean) in the trust region around a table's rows.

    The solution is clip(v - t, low, high) for the one t that makes it sum to 1, found by halving.

    Args:
        points: rows to project, float64 (C, K).
        centres: the table's rows, non-negative, summing to 1, float64 (C, K).
        radius: largest distance of each weight from its centre.

    Returns:
        float64 (C, K), rows summing to 1.
    """
    low = (centres - radius).clamp_min(0)
    high = torch.where(centres == 0, 0.0, (centres + radius).clamp_max(1))
    reach = float((points.abs() + 1).max()) if points.numel() else 1.0
    below = points.new_full((len(points), 1), -reach)
    above = points.new_full((len(points), 1), reach)
    for _ in range(_HALVINGS):
        middle = (below + above) / 2
        too_much = torch.clamp(points - middle, low, high).sum(dim=1, keepdim=True) > 1
        below, above = torch.where(too_much, middle, below), torch.where(too_much, above, middle)
    found = torch.clamp(points - (below + above) / 2, low, high)
    return found / found.sum(dim=1, keepdim=True)
