"""Where callbacks take part in an iteration: whose scores weigh how much, and which groups are learnt from.

Shapes: N samples, K rewards.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from flow_rl.batches import TASKS
from flow_rl.suggestions import nearest

#: weights of rewards by name, for each task
TaskWeights = dict[str, dict[str, float]]
_SUM_TOLERANCE = 1e-4


class WeightSource(ABC):
    """Says how much each reward weighs for each sample. A callback replaces `policy.weight_source` in `setup`."""

    @abstractmethod
    def weights(self, categories: Sequence[str], tasks: Sequence[str], reward_names: Sequence[str]) -> Tensor:
        """Weights of one iteration.

        Args:
            categories: of each sample, length N.
            tasks: of each sample, `t2i` or `edit`, length N.
            reward_names: columns of the scores, K of them.

        Returns:
            float32 (N, K), rows non-negative and summing to 1, before any mask.
        """


class GroupFilter(ABC):
    """Says which groups are learnt from. A callback adds one to `policy.group_filters` in `setup`."""

    def __str__(self) -> str:
        """Name it for a message: the callback, and the setting to change."""
        return type(self).__name__

    @abstractmethod
    def keep(self, iteration_scores: Tensor, weights: Tensor, groups: Tensor) -> Tensor:
        """Tell which samples are learnt from. The others go through the same forwards, with weight 0 in the loss.

        Every rank passes the rows of all ranks, so that what a filter remembers is the same on each.

        Args:
            iteration_scores: raw scores of the iteration, NaN where masked or not asked for, shape (N, K).
            weights: as configured, before masks, shape (N, K).
            groups: which group each sample is in, int64 (N,).

        Returns:
            bool (N,), the same for all samples of a group.
        """


class FixedWeights(WeightSource):
    """The same weights for every sample of a task.

    Args:
        by_task: for each task, weights by reward name; a reward that is not named has none.
    """

    def __init__(self, by_task: Mapping[str, Mapping[str, float]]) -> None:
        self.by_task = {task: dict(weights) for task, weights in by_task.items()}

    def weights(self, categories: Sequence[str], tasks: Sequence[str], reward_names: Sequence[str]) -> Tensor:
        """See `WeightSource.weights`.

        Raises:
            ValueError: samples of a task that has no weights.
        """
        rows = {
            task: torch.tensor([weights.get(n, 0.0) for n in reward_names]) for task, weights in self.by_task.items()
        }
        for task in dict.fromkeys(tasks):
            if task not in rows:
                raise ValueError(
                    f"The data hold '{task}' samples, but model.reward_weights is for {' and '.join(rows)} alone: add "
                    f"weights under '{task}'."
                )
        return torch.stack([rows[task] for task in tasks])


def weights_by_task(
    reward_names: Sequence[str], weights: Mapping[str, float | Mapping[str, float]] | None
) -> TaskWeights:
    """The configured weights in their full form.

    Args:
        reward_names: of all rewards.
        weights: by reward name, for whatever task; or by task and reward name, where a reward that a task does not
            name is not asked about that task's samples; None weighs all alike.

    Returns:
        weights by task and reward name, in the rewards' order.

    Raises:
        ValueError: no reward at all, an unknown task or reward, a reward without any weight, a negative weight, or a
            sum other than 1.
    """
    if not reward_names:
        raise ValueError("model.rewards is empty: name at least one reward.")
    if weights is None:
        weights = dict.fromkeys(reward_names, 1.0 / len(reward_names))
    nested = {name: value for name, value in weights.items() if isinstance(value, Mapping)}
    plain = {name: value for name, value in weights.items() if not isinstance(value, Mapping)}
    if not nested:
        _check_names(plain, reward_names, "model.reward_weights", "rewards")
        missing = [name for name in reward_names if name not in plain]
        if missing:
            raise ValueError(f"model.reward_weights has no entry for {', '.join(missing)} (0 switches a reward off).")
    elif plain:
        raise ValueError(
            f"model.reward_weights mixes weights by task ('{next(iter(nested))}') with one for all "
            f"('{next(iter(plain))}'): give either {{reward: weight}}, or {{task: {{reward: weight}}}}."
        )
    rows: Mapping[str, Mapping[str, float]] = nested or dict.fromkeys(TASKS, plain)
    _check_names(rows, TASKS, "model.reward_weights", "tasks")
    ordered = {}
    for task, row in rows.items():
        key = f"model.reward_weights.{task}" if nested else "model.reward_weights"
        _check_names(row, reward_names, key, "rewards")
        check_shares(row, key)
        ordered[task] = {name: float(row[name]) for name in reward_names if name in row}
    unasked = [name for name in reward_names if not any(name in row for row in ordered.values())]
    if unasked:
        raise ValueError(
            f"model.reward_weights names {', '.join(unasked)} for no task, so nothing would ever ask it: give it a "
            "weight, or leave it out of model.rewards."
        )
    return ordered


def _check_names(given: Iterable[str], known: Sequence[str], key: str, kind: str) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"{key} names '{name}'; the {kind} are {', '.join(known)}.{nearest(name, known)}")


def check_shares(weights: Mapping[str, float], key: str) -> None:
    """Refuse weights that are negative, or do not sum to 1, by the name of their setting.

    Raises:
        ValueError: with the weights and their sum.
    """
    total = sum(weights.values())
    # `not >=` also refuses NaN
    if not weights or not min(weights.values()) >= 0 or not abs(total - 1) <= _SUM_TOLERANCE:
        raise ValueError(f"{key} must be non-negative and sum to 1; received {dict(weights)}, which sums to {total:g}.")
