"""The states a student visits, what its update knows of them, and the gap to its teacher at fixed ones.

Shapes: N samples, K trained states a sample, M (sample, state) pairs, S latent tokens, C latent channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from datamodules.batches import Prompts
from flow.guidance import Guidance
from flow.noise import Stream
from flow.rollout import rollout
from lightning_modules.objectives import Pairs, micro_batches
from lightning_modules.sampling import Sampler, guided_velocity
from lightning_modules.teachers import TeacherBank
from lightning_modules.velocity_gap import VelocityGap
from models import Conditioning, ImageModel

_UNGUIDED = Guidance(scale=1.0)


@dataclass(frozen=True, kw_only=True)
class States:
    """What an update knows of the student's rollout.

    Attributes:
        latents: the states, constants, float32 (K, N, S, C).
        sigmas: their noise levels, (K,).
        weights: factor on the loss of each, (K,).
        conditional: of the N samples.
        unconditional: of the same with a blank prompt; None where the teacher has no guidance.
    """

    latents: Tensor
    sigmas: Tensor
    weights: Tensor
    conditional: Conditioning
    unconditional: Conditioning | None

    def micro_batches(self, size: int) -> Iterator[Pairs]:
        """All (sample, state) pairs, at most `size` at a time; a sample's together, as they share its prefix."""
        return micro_batches(len(self.conditional), len(self.sigmas), size)


@torch.no_grad()
def student_states(
    model: ImageModel,
    sampler: Sampler,
    prompts: Prompts,
    *,
    steps: Sequence[int],
    weights: Tensor,
    iteration: int,
    batch_size: int,
    guidance: Guidance,
) -> States:
    """Roll the student out by ODE, without guidance, and keep the states before the given steps.

    No step beyond the last of them is taken.

    Args:
        model: the student.
        sampler: gives schedule, image size and noise; its guidance is not used.
        prompts: N of them, one sample each.
        steps: K steps of the schedule, ascending.
        weights: factor on the loss at every step of the schedule, (T,).
        iteration: keys the noise.
        batch_size: samples denoised at a time.
        guidance: of the teacher, which may need the unconditional branch too.
    """
    sigmas, chosen = sampler.sigmas, list(steps)
    branches = replace(sampler, guidance=guidance).encode(model, prompts.texts, prompts.sources)
    noise = sampler.initial_noise(model, step=iteration, ids=prompts.ids, members=[0] * len(prompts))
    parts = []
    for rows in torch.arange(len(prompts)).split(batch_size):
        velocity = guided_velocity(model, model.cache_prefix(branches.conditional.select(rows)), None, _UNGUIDED)
        record = rollout(velocity, noise[rows], sigmas, stop=chosen[-1], record_all=True)
        parts.append(torch.cat([record.states, record.latents[None]])[chosen])
    return States(
        latents=torch.cat(parts, dim=1),
        sigmas=sigmas[chosen].to(noise.device),
        weights=weights[chosen].to(noise.device),
        conditional=branches.conditional,
        unconditional=branches.unconditional,
    )


@torch.no_grad()
def measure_gap(model: ImageModel, sampler: Sampler, bank: TeacherBank, prompts: Prompts, gap: VelocityGap) -> None:
    """Add the student's gap at states that do not move with the student: its teacher's own, from fixed noise.

    Args:
        model: the student.
        sampler: gives schedule, image size and noise.
        bank: the teachers.
        prompts: of one task, which says whose states.
        gap: takes the velocities.
    """
    guidance, sigmas = bank.guidance(prompts.task), sampler.sigmas
    branches = replace(sampler, guidance=guidance).encode(model, prompts.texts, prompts.sources)
    noise = sampler.initial_noise(model, step=0, ids=prompts.ids, members=[0] * len(prompts), stream=Stream.EVALUATION)
    targets: list[Tensor] = []
    with bank.gathered(prompts.task), bank.playing(prompts.task) as teacher:
        prefixes = [
            None if c is None else teacher.cache_prefix(c) for c in (branches.conditional, branches.unconditional)
        ]
        guided = guided_velocity(teacher, *prefixes, guidance)

        def recorded(latents: Tensor, index: int, sigma: float) -> Tensor:
            targets.append(guided(latents, index, sigma))
            return targets[-1]

        states = rollout(recorded, noise, sigmas, record_all=True).states
    student = guided_velocity(model, model.cache_prefix(branches.conditional), None, _UNGUIDED)
    for index, (latents, target) in enumerate(zip(states, targets, strict=True)):
        sigma = float(sigmas[index])
        gap.update(student(latents, index, sigma), target, torch.full_like(latents[:, 0, 0], sigma))
