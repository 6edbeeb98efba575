"""One iteration, as callbacks see it once it is over.

Shapes: N samples over all parts, N_part samples of one, H height, W width, S latent tokens, C latent channels,
K rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flow_rl.batches import Prompts
from flow_rl.distributed.gradients import world_size
from flow_rl.distributed.shares import gather_objects, gather_ranks
from flow_rl.rl.advantage_estimator import Outcome
from flow_rl.rl.objectives import Rollout


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """One iteration of this rank. `training_step` returns it under "iteration", and callbacks receive it.

    Rows are samples, parts one after another.

    All tensors are on the host: nothing here takes the device's memory from the next iteration.

    Attributes:
        number: of the iteration, from 0.
        prompts: one batch a part; every part is of one task.
        images: of each part, in [0, 1], shape (N_part, 3, H, W), members of a group side by side.
        latents: final latents of each part, shape (N_part, S, C).
        groups: which group each sample is in, int64 (N,), as `Prompts.groups` numbers them.
        categories: of each sample, length N.
        tasks: of each sample, `t2i` or `edit`, length N.
        reward_names: columns of the scores, length K.
        scores: raw scores on 1..5, NaN where masked or not asked for, float32 (N, K).
        weights: as configured, before masks, float32 (N, K).
        advantages: float32 (N,).
        teaches: which samples the update learns from, bool (N,); see `Outcome.teaches`.
    """

    number: int
    prompts: tuple[Prompts, ...]
    images: tuple[Tensor, ...]
    latents: tuple[Tensor, ...]
    groups: Tensor
    categories: tuple[str, ...]
    tasks: tuple[str, ...]
    reward_names: tuple[str, ...]
    scores: Tensor
    weights: Tensor
    advantages: Tensor
    teaches: Tensor

    def over_ranks(self) -> Iteration:
        """The iteration of all ranks, in their order, the same on each: all rows, but this rank's prompts and images.

        Every rank must ask.
        """
        if world_size() == 1:
            return self
        names = gather_objects((self.categories, self.tasks))
        return replace(
            self,
            categories=tuple(name for categories, _ in names for name in categories),
            tasks=tuple(name for _, tasks in names for name in tasks),
            groups=gather_ranks(self.groups),
            scores=gather_ranks(self.scores),
            weights=gather_ranks(self.weights),
            advantages=gather_ranks(self.advantages),
            teaches=gather_ranks(self.teaches),
        )

    @classmethod
    def of(
        cls,
        number: int,
        parts: Sequence[Prompts],
        scored: Sequence[tuple[Rollout, Outcome]],
        reward_names: Sequence[str],
    ) -> Iteration:
        """Join the rollouts of an iteration.

        Args:
            number: of the iteration.
            parts: its prompts, by task.
            scored: every rollout with its outcome, in the order of the parts; none spans two parts.
            reward_names: columns of the scores.
        """
        host = torch.device("cpu")
        rollouts = [rollout for rollout, _ in scored]
        outcomes = [outcome for _, outcome in scored]
        by_part = [[r for r in rollouts if r.prompts.task == part.task] for part in parts]
        return cls(
            number=number,
            prompts=tuple(part.to(host) for part in parts),
            images=tuple(torch.cat([r.images for r in found]) for found in by_part),
            latents=tuple(torch.cat([r.trajectory.latents.to(host) for r in found]) for found in by_part),
            groups=torch.cat([outcome.groups for outcome in outcomes]),
            categories=tuple(category for rollout in rollouts for category in rollout.categories),
            tasks=tuple(task for rollout in rollouts for task in rollout.tasks),
            reward_names=tuple(reward_names),
            scores=torch.cat([outcome.scores for outcome in outcomes]),
            weights=torch.cat([outcome.weights for outcome in outcomes]),
            advantages=torch.cat([outcome.advantages for outcome in outcomes]),
            teaches=torch.cat([outcome.teaches for outcome in outcomes]),
        )
