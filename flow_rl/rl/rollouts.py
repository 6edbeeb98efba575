"""Rolling out a chunk of prompts: from their texts to images and to what an update needs of how they came about."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from flow_rl.batches import Prompts
from flow_rl.distributed.sharding import gathered
from flow_rl.flow.windows import steps_of_iteration
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
    stochastic: bool,
    weights: Callable[[], AbstractContextManager[None]],
) -> Rollout:
    """Roll out the groups of some prompts.

    Args:
        model: the generator.
        sampler: its schedule, guidance and seed.
        prompts: P of them, all of one task.
        settings: of the rollout.
        iteration: keys noise and window.
        stochastic: whether the steps of the window are stochastic.
        weights: inside this context the transformer has the weights that roll out.

    Returns:
        The rollout of N = P G samples, everything on the model's device.
    """
    group = settings.group_size
    steps: tuple[int, ...] = ()
    if stochastic:
        steps = steps_of_iteration(settings.window, settings.num_steps, iteration=iteration, seed=sampler.seed)
    branches = sampler.encode(model, prompts.texts, prompts.sources)
    # Gathered once for all steps, and after the swap, as it takes the weights that are there.
    with weights(), gathered(model.transformer):
        trajectory = group_rollout(
            model,
            sampler,
            prompts,
            branches,
            group_size=group,
            step=iteration,
            transition=settings.transition,
            noise_level=settings.noise_level,
            stochastic_steps=steps,
            shared_noise=settings.shared_noise,
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
