"""The states a student visits, what its update knows of them, and the gap to its teacher at fixed ones.

Shapes: N samples, K trained states a sample, M (sample, state) pairs, S latent tokens, C latent channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flow_rl.batches import Prompts
from flow_rl.distillation.teachers import TeacherBank
from flow_rl.distillation.velocity_gap import VelocityGap
from flow_rl.distributed.devices import to_device
from flow_rl.distributed.sharding import gathered
from flow_rl.distributed.shares import Share
from flow_rl.flow.guidance import Guidance
from flow_rl.flow.noise import Stream
from flow_rl.flow.rollout import rollout
from flow_rl.models import Conditioning, ImageModel
from flow_rl.rl.objectives import Pairs, micro_batches
from flow_rl.rl.sampling import Branches, Sampler, guided_velocity

_UNGUIDED = Guidance(scale=1.0)


@dataclass(frozen=True, kw_only=True)
class States:
    """What an update knows of the student's rollout.

    Attributes:
        latents: the states, constants, float32 (K, N, S, C).
        sigmas: their noise levels, (K,).
        levels: the same, known to the host.
        weights: factor on the loss of each, (K,).
        conditional: of the N samples.
        unconditional: of the same with a blank prompt; None where the teacher has no guidance.
    """

    latents: Tensor
    sigmas: Tensor
    levels: tuple[float, ...]
    weights: Tensor
    conditional: Conditioning
    unconditional: Conditioning | None

    def micro_batches(self, size: int) -> Iterator[Pairs]:
        """All (sample, state) pairs, at most `size` at a time; a sample's together, as they share its prefix."""
        return micro_batches(len(self.conditional), len(self.levels), size, self.latents.device)


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
    branches: Branches,
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
        branches: of the prompts; with the unconditional one where the teacher needs it.
    """
    sigmas, chosen = sampler.sigmas, list(steps)
    noise = sampler.initial_noise(
        model, step=iteration, ids=prompts.ids, members=[0] * len(prompts), device=branches.device
    )
    parts = []
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        velocity = guided_velocity(model, model.cache_prefix(branches.conditional.select(rows)), None, _UNGUIDED)
        record = rollout(velocity, noise[rows], sigmas, stop=chosen[-1], record_all=True)
        states = (*record.states, record.latents)
        parts.append(torch.stack([states[step] for step in chosen]))
    return States(
        latents=torch.cat(parts, dim=1),
        sigmas=to_device(sigmas[chosen], noise.device),
        levels=tuple(sigmas[chosen].tolist()),
        weights=to_device(weights[chosen], noise.device),
        conditional=branches.conditional,
        unconditional=branches.unconditional,
    )


@torch.no_grad()
def measure_gap(
    model: ImageModel,
    sampler: Sampler,
    bank: TeacherBank,
    prompts: Prompts,
    gap: VelocityGap,
    device: torch.device = torch.device("cpu"),  # noqa: B008  (immutable)
) -> None:
    """Add the student's gap at states that do not move with the student: its teacher's own, from fixed noise.

    Args:
        model: the student.
        sampler: gives schedule, image size and noise.
        bank: the teachers.
        prompts: of one task, which says whose states; the same on every rank, each of which takes its share.
        gap: takes the velocities of this rank's share.
        device: where the model computes.
    """
    guidance, sigmas, share = bank.guidance(prompts.task), sampler.sigmas, Share.of(len(prompts))
    prompts = prompts.select(list(share.rows)).to(device)
    branches = replace(sampler, guidance=guidance).encode(model, prompts.texts, prompts.sources)
    noise = sampler.initial_noise(
        model,
        step=0,
        ids=prompts.ids,
        members=[0] * len(prompts),
        device=branches.device,
        stream=Stream.EVALUATION,
    )
    targets: list[Tensor] = []
    with ExitStack() as whole:
        if bank.has_own_transformer(prompts.task):
            whole.enter_context(bank.gathered(prompts.task))
        else:
            whole.enter_context(gathered(model.transformer))
        teacher = whole.enter_context(bank.playing(prompts.task))
        conditional, blank = branches.conditional, branches.unconditional
        unconditional = None if blank is None else teacher.cache_prefix(blank)
        guided = guided_velocity(teacher, teacher.cache_prefix(conditional), unconditional, guidance)

        def recorded(latents: Tensor, index: int, sigma: float) -> Tensor:
            targets.append(guided(latents, index, sigma))
            return targets[-1]

        states = rollout(recorded, noise, sigmas, record_all=True).states
    with gathered(model.transformer):
        student = guided_velocity(model, model.cache_prefix(branches.conditional), None, _UNGUIDED)
        for index, (latents, target) in enumerate(zip(states, targets, strict=True)):
            sigma = float(sigmas[index])
            velocity, own = student(latents, index, sigma), slice(share.own)
            gap.update(velocity[own], target[own], torch.full_like(latents[own, 0, 0], sigma))
