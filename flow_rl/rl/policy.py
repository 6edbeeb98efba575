"""What library code may ask of a policy in training, whoever trains it.

Shapes: N samples, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from flow_rl.batches import Prompts
from flow_rl.models import ImageModel
from flow_rl.rewards import Reward
from flow_rl.rl.advantage_estimator import Outcome
from flow_rl.rl.objectives import Rollout
from flow_rl.rl.reward_weights import WeightSource
from flow_rl.rl.sampling import Sampler


class Policy(Protocol):
    """A policy with its model configured. `lightning_modules.GRPOPolicy` is one.

    Attributes:
        model: the generator in training.
        sampler: draws at the rollout's own settings.
        rewards: training rewards by name.
        monitors: scorers that training never uses, by name.
        weight_source: says how much each reward weighs.
        iteration: iterations done.
    """

    model: ImageModel
    sampler: Sampler
    rewards: Mapping[str, Reward]
    monitors: Mapping[str, Reward]
    weight_source: WeightSource
    iteration: int

    @property
    def compute_device(self) -> torch.device:
        """The device for inputs, latents and images."""

    def asks(self, name: str, task: str) -> bool:
        """Whether the scorer of that name is asked about samples of a task."""

    def roll_out(self, prompts: Prompts) -> Rollout:
        """The images of every group, and what the updates need of how they came about."""

    def score(self, rollout: Rollout) -> Outcome:
        """Score one rollout at once."""

    def prepare(self, rollout: Rollout, update: int) -> dict[str, Tensor]:
        """What the old policy and the reference give for an update, from 0."""

    def accumulate_gradients(
        self,
        rollout: Rollout,
        advantages: Tensor,
        prepared: dict[str, Tensor],
        *,
        teaches: Tensor | None = None,
        pairs: int | None = None,
    ) -> dict[str, Tensor]:
        """Backward micro-batch by micro-batch."""

    def zero_grad(self) -> None:
        """Drop all gradients."""
