"""Runs that stop themselves, because going on would learn nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from typing import TYPE_CHECKING

from flow_rl.messages import warn_on_first_rank

if TYPE_CHECKING:  # the entry point needs the exception before it needs any generator
    from flow_rl.rl.iteration import Iteration
from flow_rl.errors import RunStopped


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
