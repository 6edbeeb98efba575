"""Runs that stop themselves, because they would learn nothing more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from typing import Literal

import torch

from flow_rl.errors import RunStopped
from flow_rl.flow.advantages import rows_with_signal
from flow_rl.messages import warn_on_first_rank
from flow_rl.rewards.composite import weighted_mean
from flow_rl.rl.iteration import Iteration
from flow_rl.rl.reward_weights import GroupFilter


class SilentRewards:
    """Notices rewards that score nothing: a masked sample is left out in silence, and a run would go on without them.

    A task whose rewards have scored nothing at all in the first iteration stops the run: they are of another task, do
    not understand these prompts, or cannot be reached. Rewards that fall silent later may come back. One reward of
    several is only warned of: it may be meant for a rare kind of sample, as one of faces is.

    Args:
        patience: iterations in a row without a score before a reward is warned of, or before a task stops the run.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        #: iterations since the last score, by task, or by task and reward; absent before the first look
        self._silent: Counter[Hashable] = Counter()

    def check(self, iteration: Iteration) -> None:
        """Look at an iteration of all ranks, which then stop together.

        Raises:
            RunStopped: a task has had no score at all for too long.
        """
        for task in dict.fromkeys(iteration.tasks):
            rows = [row for row, of in enumerate(iteration.tasks) if of == task]
            asked = iteration.weights[rows] > 0
            scored = (asked & ~iteration.scores[rows].isnan()).any(0).tolist()
            first = task not in self._silent
            silent = self._count(task, any(scored))
            if silent >= self.patience or (silent and first):
                when = "so far" if first else f"for {silent} iterations"
                raise RunStopped(
                    f"Stopped at iteration {iteration.number}: no reward has scored a sample of the task '{task}' "
                    f"{when}. Are they meant for this task, do they understand these prompts, can they be reached?"
                )
            for column, name in enumerate(iteration.reward_names):
                if asked[:, column].any() and self._count((task, name), scored[column]) == self.patience:
                    warn_on_first_rank(
                        f"model.rewards.{name} has scored no sample of the task '{task}' in {self.patience} "
                        "iterations; training goes on by the others. Is it meant for these prompts, can it be reached?"
                    )

    def _count(self, key: Hashable, scored: bool) -> int:
        self._silent[key] = 0 if scored else self._silent[key] + 1
        return self._silent[key]


class SilentIterations:
    """Notices iterations that teach nothing: rewards that tell no images apart, or filters that refuse every group.

    Args:
        patience: such iterations in a row before the run stops.

    Attributes:
        count: such iterations in a row until now, over all ranks.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.count = 0

    def check(
        self, iteration: Iteration, *, filters: Sequence[GroupFilter], mode: Literal["per_reward", "sum"]
    ) -> None:
        """Look at an iteration of all ranks, which then stop together.

        Args:
            iteration: of all ranks.
            filters: of the run.
            mode: of its advantages.

        Raises:
            RunStopped: nothing was learnt from for too long.
        """
        self.count = 0 if iteration.teaches.any() else self.count + 1
        if self.count < self.patience:
            return
        differs = rows_with_signal(iteration.scores, iteration.groups, iteration.weights, mode=mode)
        reason = _refused(iteration, filters) if differs.any() else _flat(iteration)
        raise RunStopped(
            f"Stopped at iteration {iteration.number}: the last {self.count} iterations (model.max_silent) taught "
            f"nothing. {reason} Checkpoints are kept; the weights have not changed since."
        )


def _refused(iteration: Iteration, filters: Sequence[GroupFilter]) -> str:
    """Say that filters refused all groups."""
    weighted = weighted_mean(iteration.scores, iteration.weights)
    members = [weighted[iteration.groups == group] for group in iteration.groups.unique()]
    scored = [values for group in members if len(values := group[~group.isnan()])]
    widest = max(float(values.max() - values.min()) for values in scored)
    return (
        f"{' and '.join(map(str, filters))} refused all {len(members)} groups of an iteration. In the last one the "
        f"widest range of the weighted reward in a group was {widest:.3g}. Lower the threshold, or train on prompts "
        "whose images the rewards tell apart (train.py curate finds them)."
    )


def _flat(iteration: Iteration) -> str:
    """Say which rewards told no images apart."""
    return (
        f"No reward told the images of a group apart: {'; '.join(_constants(iteration))}. Use rewards with finer "
        "scores, train on prompts whose images they tell apart (train.py curate finds them), or raise "
        "model.rollout.group_size."
    )


def _constants(iteration: Iteration) -> Iterator[str]:
    """What each reward with a weight said."""
    for column, name in enumerate(iteration.reward_names):
        values = iteration.scores[iteration.weights[:, column] > 0, column]
        if not len(values):
            continue
        values = values[~values.isnan()]
        if not len(values):
            yield f"'{name}' scored nothing"
        elif torch.equal(values, values[:1].expand_as(values)):
            yield f"'{name}' gave {float(values[0]):.3g} to every image"
        else:
            yield f"'{name}' gave {float(values.min()):.3g} to {float(values.max()):.3g}, the same within a group"
