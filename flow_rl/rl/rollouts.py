"""Rolling out a chunk of prompts: from their texts to images and to what an update needs of how they came about."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from flow_rl.batches import Prompts
from flow_rl.distributed.sharding import gathered
from flow_rl.models import ImageModel
from flow_rl.rl.objectives import Rollout
from flow_rl.rl.sampling import Sampler, group_rollout
from flow_rl.rl.settings import RolloutSettings


@torch.no_grad()
def roll_out(
    model: ImageModel,
    sampler: Sampler,
    prompts: Prompts,
    settings: RolloutSettings,
    *,
    iteration: int,
    stochastic_steps: tuple[int, ...],
    weights: Callable[[], AbstractContextManager[None]],
) -> Rollout:
    """Roll out the groups of some prompts.

    Args:
        model: the generator.
        sampler: its schedule, guidance and seed.
        prompts: P of them, all of one task.
        settings: of the rollout.
        iteration: keys the noise.
        stochastic_steps: of the iteration; see `Objective.stochastic_steps`.
        weights: inside this context the transformer has the weights that roll out.

    Returns:
        The rollout of N = P G samples, everything on the model's device.
    """
    group = settings.group_size
    branches = sampler.encode(model, prompts.texts, prompts.sources)
    # Gathered once for all steps, and after the swap, as it takes the weights that are there.
    with weights(), gathered(model.transformer):
        trajectory = group_rollout(
            model,
            sampler,
            prompts,
            branches,
            settings,
            group_size=group,
            step=iteration,
            stochastic_steps=stochastic_steps,
        )
    images = model.decode(trajectory.latents)
    seen = branches.repeat_interleave(group)
    return Rollout(
        settings=settings,
        prompts=prompts,
        images=images,
        trajectory=trajectory,
        sigmas=sampler.sigmas,
        conditioning=seen.conditional,
        unconditional=seen.unconditional if settings.cfg == "both" else None,
        members=tuple(range(group)) * len(prompts),
        iteration=iteration,
        seed=sampler.seed,
    )
