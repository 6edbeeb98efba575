"""Several rewards on one batch: raw scores, weights, and what to log of them.

Shapes: N samples, K rewards.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rewards import Reward, Samples
from rewards.composite import weighted_mean


def check_weights(rewards: Mapping[str, Reward], weights: Mapping[str, float] | None) -> dict[str, float]:
    """Weights by reward name, equal ones where none are given.

    Raises:
        ValueError: no reward at all, a weight for an unknown reward or none for a known one, a negative weight,
            or a sum other than 1.
    """
    if not rewards:
        raise ValueError("model.rewards is empty: name at least one reward.")
    if weights is None:
        return dict.fromkeys(rewards, 1.0 / len(rewards))
    for name in weights.keys() - rewards.keys():
        near = difflib.get_close_matches(name, list(rewards), 1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"model.reward_weights names '{name}'; the rewards are {', '.join(rewards)}.{hint}")
    missing = [name for name in rewards if name not in weights]
    if missing:
        raise ValueError(f"model.reward_weights has no entry for {', '.join(missing)} (0 switches a reward off).")
    if min(weights.values()) < 0 or abs(sum(weights.values()) - 1) > 1e-4:
        raise ValueError(
            f"model.reward_weights must be non-negative and sum to 1; received {dict(weights)}, which sums to "
            f"{sum(weights.values()):g}."
        )
    return {name: float(weights[name]) for name in rewards}


def score_all(rewards: Mapping[str, Reward], samples: Samples) -> Tensor:
    """Raw scores (N, K) in the rewards' order, NaN where one could not score a sample.

    Raises:
        ValueError: a reward that broke its contract (shape, or a number outside [1, 5]).
    """
    columns = []
    for name, reward in rewards.items():
        scores = reward.score(samples).float().cpu()
        if scores.shape != (len(samples),):
            raise ValueError(f"Reward '{name}' returned shape {tuple(scores.shape)} for {len(samples)} samples.")
        finite = scores[~scores.isnan()]
        if finite.numel() and (finite.min() < 1 - 1e-4 or finite.max() > 5 + 1e-4):
            raise ValueError(
                f"Reward '{name}' returned scores from {finite.min():.3f} to {finite.max():.3f}; the scale is 1..5. "
                "A sample that cannot be scored must be NaN."
            )
        columns.append(scores)
    return torch.stack(columns, dim=1)


def group_statistics(scores: Tensor, groups: Tensor) -> dict[str, float]:
    """In-group range and standard deviation of raw scores (N,), averaged over the groups; NaN is left out."""
    ranges, deviations = [], []
    for group in groups.unique():
        values = scores[groups == group]
        values = values[~values.isnan()]
        if values.numel():
            ranges.append((values.max() - values.min()).item())
            deviations.append(values.std(correction=0).item())
    count = max(len(ranges), 1)
    return {"range": sum(ranges) / count, "std": sum(deviations) / count}


def means_by_category(scores: Tensor, categories: Sequence[str]) -> dict[str, float]:
    """Mean of the scores (N,) that are not NaN, by category; a category without any is left out."""
    means = {}
    for category in sorted(set(categories)):
        values = scores[[i for i, c in enumerate(categories) if c == category]]
        values = values[~values.isnan()]
        if values.numel():
            means[category] = values.mean().item()
    return means


def reward_metrics(
    rewards: Mapping[str, Reward],
    weights: Mapping[str, float],
    scores: Tensor,
    groups: Tensor,
    categories: Sequence[str],
) -> dict[str, float]:
    """What to log of one iteration's scores.

    Args:
        rewards: by name, K of them, in the order of the scores' columns.
        weights: by the same names.
        scores: raw scores, NaN where masked, shape (N, K).
        groups: which group each sample is in, int64 (N,).
        categories: of each sample, length N.

    Returns:
        `reward/...` over all samples and by reward, with what each reward says of its own scoring, and
        `category/...`, the weighted mean by category.
    """
    weighted = weighted_mean(scores, torch.tensor(list(weights.values())))
    values = {"reward/mean": weighted.nanmean().item()}
    values |= {f"reward/{key}": value for key, value in group_statistics(weighted, groups).items()}
    for k, (name, reward) in enumerate(rewards.items()):
        column = scores[:, k]
        found = {"mean": column.nanmean().item(), "masked": column.isnan().float().mean().item()}
        found |= group_statistics(column, groups) | reward.statistics()
        values |= {f"reward/{name}/{key}": value for key, value in found.items()}
    return values | {f"category/{key}": value for key, value in means_by_category(weighted, categories).items()}
