"""Group-relative advantages of several rewards (arXiv 2606.27608, Eq. 13; GDPO, arXiv 2601.05242).

    A_i = sum_k w_k (R_k,i - mu_k) / max(sigma_k, floor)

mu and sigma are taken over the group of one prompt, each reward by itself, so that a reward with a wide
spread does not drown the others.

Shapes: N samples (all groups together), K rewards, M groups.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

_WEIGHT_SUM_TOLERANCE = 1e-4
_BATCH_STD_FLOOR = 1e-4
#: a range of scores (float32, up to 5) that is rounding
_FLAT_RANGE = 1e-6


def group_advantages(
    scores: Tensor,
    groups: Tensor,
    weights: Tensor,
    *,
    std_floor: float = 0.05,
    clip: float | None = None,
    mode: Literal["per_reward", "sum"] = "per_reward",
    batch_normalise: bool = False,
) -> Tensor:
    """Turn raw scores into one advantage a sample.

    A NaN score is masked: it leaves its group's mean and deviation, and that sample's other weights are
    scaled up to sum to 1. A sample without any score gets 0. A reward that is constant in a group
    contributes exactly 0.

    Args:
        scores: raw scores, NaN where a sample was not scored, shape (N, K). With several ranks, the gathered
            scores: groups and `batch_normalise` look at all rows given.
        groups: the group (prompt) of each sample by a stable integer id, int64, shape (N,), in any order.
        weights: weight of each reward for each sample, not negative, each row summing to 1, shape (N, K).
        std_floor: smallest (population) deviation that a group is divided by, in score units: the divisor is
            max(sigma, std_floor), so that noise-level gaps are not blown up.
        clip: advantages are clamped to [-clip, clip] at the end; None leaves them.
        mode: `per_reward` normalises each reward and then sums (Eq. 13); `sum` normalises the weighted sum,
            the baseline it is compared with.
        batch_normalise: standardise the result once more over all scored samples, as GDPO's code does.

    Returns:
        float32, shape (N,). Without masks and clipping, each group's advantages sum to 0.

    Raises:
        ValueError: for shapes that disagree, groups that are not integers, infinite scores, weights that are
            negative or do not sum to 1, or options out of range.
    """
    _check(scores, groups, weights, std_floor, clip, mode)
    scores = scores.double()
    valid = ~scores.isnan()
    weights = effective_weights(weights.double(), scores)
    # Weight left anywhere? A sample whose only scores have weight 0 is as good as not scored.
    scored = weights.sum(dim=1) > 0
    group, num_groups = _consecutive(groups)
    if mode == "sum":
        z = _z_scores(_composite(scores, weights), scored.unsqueeze(1), group, num_groups, std_floor)
        advantages = z.squeeze(1)
    else:
        z = _z_scores(scores, valid, group, num_groups, std_floor)
        advantages = (weights * z).sum(dim=1)
    if batch_normalise:
        everyone = torch.zeros_like(group)
        advantages = _z_scores(advantages.unsqueeze(1), scored.unsqueeze(1), everyone, 1, _BATCH_STD_FLOOR).squeeze(1)
    if clip is not None:
        advantages = advantages.clamp(-clip, clip)
    return advantages.float()


def rows_with_signal(
    scores: Tensor, groups: Tensor, weights: Tensor, *, mode: Literal["per_reward", "sum"] = "per_reward"
) -> Tensor:
    """Tell which samples have something to teach: they are scored, and their group is not flat.

    A group is flat where no reward that has weight tells two of its samples apart beyond rounding (mode `sum`: where
    the weighted sum does not). In any other group all scored samples count, also one whose own advantage is 0.

    Args:
        scores: see `group_advantages`, shape (N, K).
        groups: see `group_advantages`, shape (N,).
        weights: see `group_advantages`, shape (N, K).
        mode: see `group_advantages`.

    Returns:
        bool, shape (N,).
    """
    scores = scores.double()
    weights = effective_weights(weights.double(), scores)
    scored = weights.sum(dim=1) > 0
    group, num_groups = _consecutive(groups)
    values, valid = (_composite(scores, weights), scored.unsqueeze(1)) if mode == "sum" else (scores, weights > 0)
    index = group.unsqueeze(1).expand_as(values)
    lowest, highest = (
        values.new_full((num_groups, values.shape[1]), outside).scatter_reduce(
            0, index, torch.where(valid, values, outside), reduce=reduction
        )
        for outside, reduction in ((torch.inf, "amin"), (-torch.inf, "amax"))
    )
    return scored & (highest - lowest > _FLAT_RANGE).any(dim=1)[group]


def effective_weights(weights: Tensor, scores: Tensor) -> Tensor:
    """Weights once masked scores are out: theirs are 0 and the others scaled up to sum to 1.

    Args:
        weights: as configured, shape (N, K).
        scores: raw, NaN where masked, shape (N, K).

    Returns:
        shape (N, K); a row of zeros where no weight is left.
    """
    present = weights * ~scores.isnan()
    return present / present.sum(dim=1, keepdim=True).clamp_min(torch.finfo(present.dtype).tiny)


def _composite(scores: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of the rewards, shape (N, 1); NaN scores have no weight."""
    return (weights * scores.nan_to_num()).sum(dim=1, keepdim=True)


def _z_scores(values: Tensor, valid: Tensor, group: Tensor, num_groups: int, floor: float) -> Tensor:
    """Standardise each column within each group over its valid entries; 0 at the others. Shape (N, K)."""
    index = group.unsqueeze(1).expand_as(values)
    empty = values.new_zeros(num_groups, values.shape[1])
    count = empty.scatter_add(0, index, valid.to(values.dtype)).clamp_min(1)
    # Measured from the group's lowest score, a constant group is all zeros and stays so: a mean of equal
    # numbers need not equal them in floating point.
    lowest = empty.scatter_reduce(0, index, torch.where(valid, values, torch.inf), reduce="amin", include_self=False)
    shifted = torch.where(valid, values - lowest[group], 0.0)
    mean = empty.scatter_add(0, index, shifted) / count
    centred = torch.where(valid, shifted - mean[group], 0.0)
    std = (empty.scatter_add(0, index, centred.square()) / count).sqrt()
    return centred / std.clamp_min(max(floor, torch.finfo(std.dtype).tiny))[group]


def _consecutive(groups: Tensor) -> tuple[Tensor, int]:
    """Renumber group ids to 0..M-1."""
    unique, group = groups.unique(return_inverse=True)
    return group, len(unique)


def _check(scores: Tensor, groups: Tensor, weights: Tensor, std_floor: float, clip: float | None, mode: str) -> None:
    if scores.ndim != 2 or weights.shape != scores.shape or groups.shape != scores.shape[:1]:
        raise ValueError(
            "Expected scores (N, K), groups (N,) and weights (N, K); received "
            f"{tuple(scores.shape)}, {tuple(groups.shape)} and {tuple(weights.shape)}. One weight row for "
            "all samples is weights.expand(N, K)."
        )
    if groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool:
        raise ValueError(
            f"groups must be integer ids (int64), received {groups.dtype}. As float32, ids above 2^24 "
            "collide and samples of different prompts share a mean."
        )
    if mode not in ("per_reward", "sum"):
        raise ValueError(f"mode must be 'per_reward' or 'sum', received '{mode}'.")
    if not 0 <= std_floor < float("inf"):
        raise ValueError(f"std_floor must be a number from 0 up, in score units; received {std_floor}.")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be above 0, or None for no clipping; received {clip}.")
    if bool(scores.isinf().any()):
        row, column = scores.isinf().nonzero()[0].tolist()
        raise ValueError(f"scores[{row}, {column}] is infinite. A sample that could not be scored is NaN.")
    _check_weights(weights)


def _check_weights(weights: Tensor) -> None:
    bad = ~(weights >= 0).all(dim=1) | ~((weights.sum(dim=1) - 1).abs() <= _WEIGHT_SUM_TOLERANCE)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        values = [round(value, 6) for value in weights[row].tolist()]
        raise ValueError(
            f"Reward weights must not be negative and must sum to 1 for each sample; row {row} is {values}, "
            f"which sums to {round(sum(values), 6)}. Divide the weights by their sum."
        )
