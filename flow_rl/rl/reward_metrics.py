"""What to log of an iteration's scores and of its updates.

Shapes: N samples, K rewards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flow_rl.batches import labels
from flow_rl.flow.advantages import effective_weights
from flow_rl.rewards import Reward
from flow_rl.rewards.asking import statistics_of
from flow_rl.rewards.composite import weighted_mean
from flow_rl.rl.iteration import Iteration


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


def means_by_label(scores: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Mean of the scores (N,) that are not NaN, by name (N); a name without any is left out."""
    means = {}
    for name, rows in _rows(names).items():
        values = scores[rows]
        values = values[~values.isnan()]
        if values.numel():
            means[name] = values.mean().item()
    return means


def reward_metrics(rewards: Mapping[str, Reward], iteration: Iteration) -> dict[str, float]:
    """What to log of one iteration's scores.

    Args:
        rewards: by name, K of them, in the order of the scores' columns.
        iteration: which is over.

    Returns:
        `reward/...` over all samples and by reward, over the samples it was asked about, with what each reward says
        of its own scoring; `category/...`, the weighted mean by category, and `task/...` by task where there are
        several; `weight/<category>/<reward>` as configured and `weight_effective/...` after masks.
    """
    scores, weights, groups = iteration.scores, iteration.weights, iteration.groups
    names = labels(iteration.categories, iteration.tasks)
    weighted = weighted_mean(scores, weights)
    values = {"reward/mean": weighted.nanmean().item()}
    values |= {f"reward/{key}": value for key, value in group_statistics(weighted, groups).items()}
    for k, (name, reward) in enumerate(rewards.items()):
        # What a task does not ask of a reward is no mask of it.
        asked = weights[:, k] > 0
        if not asked.any():
            asked = torch.ones_like(asked)
        column = scores[asked, k]
        found = {"mean": column.nanmean().item(), "masked": column.isnan().float().mean().item()}
        found |= group_statistics(column, groups[asked]) | statistics_of(reward, name)
        values |= {f"reward/{name}/{key}": value for key, value in found.items()}
    values |= {f"category/{key}": value for key, value in means_by_label(weighted, names).items()}
    if len(set(iteration.tasks)) > 1:
        values |= {f"task/{key}": value for key, value in means_by_label(weighted, iteration.tasks).items()}
    if len(rewards) > 1:
        values |= weights_by_label("weight", weights, names, list(rewards))
        values |= weights_by_label("weight_effective", effective_weights(weights, scores), names, list(rewards))
    return values


def combined(collected: Sequence[tuple[int, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """Metrics of several pieces of a batch, as (pairs, metrics) each, as those of the whole batch.

    The loss of a piece is its share of the whole, so the shares are summed; a `..._max` is the largest; everything
    else is a mean over pairs. Results stay on the device of the metrics: looking at them would make the host wait.
    """
    total = sum(count for count, _ in collected)
    whole: dict[str, Tensor] = {}
    for name in collected[0][1]:
        values = [(count, metrics[name].detach().float()) for count, metrics in collected]
        nothing = torch.zeros_like(values[0][1])
        if name == "loss":
            whole[name] = sum((value for _, value in values), nothing)
        elif name.endswith("_max"):
            whole[name] = torch.stack([value for _, value in values]).max()
        else:
            whole[name] = sum((value * count for count, value in values), nothing) / total
    return whole


def update_means(updates: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Means over the updates of an iteration of their scalar metrics, brought to the host in one copy."""
    names = list(updates[0])
    home = updates[0]["loss"].device
    table = torch.stack([torch.stack([update[name].float().to(home) for name in names]) for update in updates]).cpu()
    return {name: float(table[:, column].contiguous().mean()) for column, name in enumerate(names)}


def weights_by_label(key: str, weights: Tensor, names: Sequence[str], rewards: Sequence[str]) -> dict[str, float]:
    """Mean weight of each reward by label, from (N, K)."""
    values = {}
    for label, rows in _rows(names).items():
        for name, mean in zip(rewards, weights[rows].mean(dim=0).tolist(), strict=True):
            values[f"{key}/{label}/{name}"] = mean
    return values


def _rows(names: Sequence[str]) -> dict[str, list[int]]:
    return {name: [i for i, other in enumerate(names) if other == name] for name in sorted(set(names))}
