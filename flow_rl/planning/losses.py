"""The loss of one micro-batch of a run, made by the run's own objective from a rollout that holds no values.

Shapes: P prompts, M samples, S latent tokens, C latent channels, T denoising steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flow_rl.batches import Prompts
from flow_rl.flow.objectives import velocity_matching_loss
from flow_rl.flow.rollout import Trajectory
from flow_rl.models import Conditioning, ImageModel
from flow_rl.models.loading import peek_sigmas
from flow_rl.planning.meter import hollow
from flow_rl.rl.objectives import Rollout, micro_batches

#: makes everything that a micro-batch's loss needs, and gives the function that computes it
Loss = Callable[[ImageModel, Conditioning, Conditioning | None], Callable[[], Tensor]]


@functools.lru_cache(maxsize=8)
def loss_of(module: Any) -> Loss:
    """The loss of a module that trains a generator; the same function for the same module."""
    if hasattr(module, "distillation_settings"):
        return _student_loss
    return functools.partial(_policy_loss, module)


def needs_unconditional(module: Any) -> bool:
    """Whether an update evaluates the unconditional branch too."""
    return getattr(getattr(module, "rollout_settings", None), "cfg", "") == "both"


def _policy_loss(
    module: Any, model: ImageModel, conditional: Conditioning, unconditional: Conditioning | None
) -> Callable[[], Tensor]:
    objective, rollout_settings = module.objective, module.rollout_settings
    size, samples, prompts = (module.image_size, module.image_size), len(conditional), len(conditional.embeds)
    shape = model.latent_shape(*size)
    rollout = Rollout(
        settings=rollout_settings,
        images=hollow(samples, 3, *size),
        prompts=Prompts(ids=tuple(range(prompts)), texts=("",) * prompts, categories=("",) * prompts),
        trajectory=Trajectory(
            latents=hollow(samples, *shape),
            steps=(0,),
            states=hollow(1, samples, *shape),
            next_states=hollow(1, samples, *shape),
        ),
        sigmas=peek_sigmas(module.model_path, rollout_settings.num_steps, image_size=size),
        conditioning=conditional,
        unconditional=unconditional,
        members=tuple(range(samples)),
        iteration=0,
        seed=0,
    )
    prepared = objective.prepare(model, rollout, 0)
    if objective.uses_reference:
        prepared |= objective.prepare_reference(model, rollout, prepared)
    pairs = next(micro_batches(samples, 1, samples))
    return lambda: objective.loss(model, rollout, torch.zeros(samples), pairs, prepared, denominator=samples)[0]


def _student_loss(
    model: ImageModel, conditional: Conditioning, unconditional: Conditioning | None
) -> Callable[[], Tensor]:
    samples = len(conditional)
    states, targets = (hollow(samples, *model.latent_shape(*model.image_size)) for _ in range(2))
    ones = hollow(samples)

    def loss() -> Tensor:
        velocity = model.velocity(states, ones, conditional)
        return velocity_matching_loss(velocity, targets, weights=ones, denominator=samples)[0]

    return loss
