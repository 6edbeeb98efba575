"""A reward that judges some semantic categories only.

Shapes: N samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from flow_rl.rewards.asking import ask
from flow_rl.rewards.base import Reward, Samples
from flow_rl.rewards.faults import select


class CategoryReward(Reward):
    """Sends the samples of some categories to a reward; the others score NaN, which is a mask.

    The paper's portrait reward judges portraits only. A mask says so without a weight table: the other rewards' weights
    are scaled up for the samples that this one leaves out. The wrapped reward never sees those samples, so they cost
    nothing. A remote reward inside blocks until its scores are there.

    Args:
        reward: the scorer.
        categories: whose samples it scores.

    Raises:
        ValueError: no categories.
    """

    def __init__(self, reward: Reward, categories: Sequence[str]) -> None:
        if not categories or isinstance(categories, str):
            raise ValueError(f"CategoryReward categories is {categories!r}; give a list of at least one category.")
        self.reward = reward
        self.categories = tuple(categories)

    @property
    @override
    def judges_edits(self) -> bool:
        return self.reward.judges_edits

    @override
    def score(self, samples: Samples) -> Tensor:
        """Score a batch; NaN where the category is another one, or where the wrapped reward says so."""
        rows = [row for row, category in enumerate(samples.categories) if category in self.categories]
        scores = torch.full((len(samples),), torch.nan)
        if rows:
            scores[rows] = ask(self.reward, select(samples, rows), "init_args.reward", section=None)
        return scores

    @override
    def statistics(self) -> dict[str, float]:
        """The wrapped reward's."""
        return self.reward.statistics()
