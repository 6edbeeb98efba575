"""Drawing images from an `ImageModel`: guidance, keyed noise, groups.

Shapes: P prompts, G images a prompt, N = P G samples, S latent tokens, C latent channels, K recorded steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from datamodules.batches import Prompts
from flow.guidance import Guidance, guide
from flow.noise import Stream, batch_noise
from flow.rollout import Trajectory, rollout
from models import Conditioning, ImageModel

VelocityFn = Callable[[Tensor, int, float], Tensor]


@dataclass(frozen=True, kw_only=True)
class Branches:
    """What guidance compares.

    Attributes:
        conditional: of N samples.
        unconditional: of the same samples with a blank prompt; None where guidance is off.
    """

    conditional: Conditioning
    unconditional: Conditioning | None

    def cached(self, model: ImageModel) -> Branches:
        """With the model's prefix computed, for many evaluations under the same weights."""
        return self._each(model.cache_prefix)

    def repeat_interleave(self, times: int) -> Branches:
        """Every sample `times` times, copies side by side."""
        return self._each(lambda branch: branch.repeat_interleave(times))

    def _each(self, change: Callable[[Conditioning], Conditioning]) -> Branches:
        blank = self.unconditional
        return Branches(conditional=change(self.conditional), unconditional=None if blank is None else change(blank))


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A way to draw images: schedule, guidance and the noise's seed.

    Attributes:
        sigmas: schedule, float32 (T + 1,).
        guidance: scale and interval.
        size: height and width in pixels.
        seed: of the noise.
        batch_size: images drawn at a time; bounds memory, changes nothing else.
    """

    sigmas: Tensor
    guidance: Guidance
    size: tuple[int, int]
    seed: int
    batch_size: int = 128

    def initial_noise(
        self,
        model: ImageModel,
        *,
        step: int,
        ids: Sequence[int],
        members: Sequence[int],
        stream: Stream = Stream.INITIAL,
    ) -> Tensor:
        """Noise (N, S, C) that depends on (seed, step, id, member) alone, whatever else is in the batch."""
        shape = model.latent_shape(*self.size)
        noise = batch_noise(shape, seed=self.seed, step=step, ids=ids, members=members, stream=stream)
        return noise.to(next(model.transformer.parameters()).device)

    @torch.no_grad()
    def images(self, model: ImageModel, prompts: Prompts, *, members: int = 1) -> Tensor:
        """Draw `members` images a prompt by ODE, from noise fixed by (seed, prompt id, member).

        Returns:
            images in [0, 1], shape (P * members, 3, H, W), members of a prompt side by side.
        """
        return self.draw(model, prompts, members=members)[0]

    @torch.no_grad()
    def draw(self, model: ImageModel, prompts: Prompts, *, members: int = 1) -> tuple[Tensor, Tensor]:
        """What `images` gives, and the final latents (P * members, S, C) that it was decoded from."""
        made, latents = [], []
        for part in prompts.parts(max(1, self.batch_size // members)):
            noise = self.initial_noise(
                model,
                step=0,
                ids=part.repeat_interleave(members).ids,
                members=list(range(members)) * len(part),
                stream=Stream.EVALUATION,
            )
            velocity = self.velocity(model, part.texts, part.sources, repeats=members)
            latents.append(rollout(velocity, noise, self.sigmas).latents)
            made.append(model.decode(latents[-1], size=self.size))
        return torch.cat(made), torch.cat(latents)

    @torch.no_grad()
    def encode(self, model: ImageModel, texts: Sequence[str], sources: Tensor | None = None) -> Branches:
        """Both branches of P texts. Guidance keeps the source image in both."""
        conditional = model.encode(texts, sources, size=self.size)
        if self.guidance.scale == 1:
            return Branches(conditional=conditional, unconditional=None)
        if sources is not None:
            return Branches(
                conditional=conditional, unconditional=model.encode([""] * len(texts), sources, size=self.size)
            )
        blank = model.encode([""], size=self.size)  # one blank prompt serves them all
        return Branches(conditional=conditional, unconditional=blank.select([0] * len(texts)))

    def velocity(
        self, model: ImageModel, texts: Sequence[str], sources: Tensor | None = None, *, repeats: int = 1
    ) -> VelocityFn:
        """The guided velocity of each text, `repeats` samples a text, with the prefix computed once."""
        branches = self.encode(model, texts, sources).cached(model).repeat_interleave(repeats)
        return guided_velocity(model, branches.conditional, branches.unconditional, self.guidance)


def guided_velocity(
    model: ImageModel, conditional: Conditioning, unconditional: Conditioning | None, guidance: Guidance
) -> VelocityFn:
    """A rollout's velocity: conditional, plus guidance where it is active.

    Args:
        model: evaluates the branches.
        conditional: of N samples.
        unconditional: of the same samples with a blank prompt; None where guidance is off.
        guidance: scale and interval of sigma.
    """

    def velocity(latents: Tensor, _index: int, sigma: float) -> Tensor:
        v = model.velocity(latents, sigma, conditional)
        if unconditional is None or not guidance.active(sigma):
            return v
        return guide(v, model.velocity(latents, sigma, unconditional), guidance.scale, rescale=guidance.rescale)

    return velocity


@torch.no_grad()
def group_rollout(
    model: ImageModel,
    sampler: Sampler,
    prompts: Prompts,
    branches: Branches,
    *,
    group_size: int,
    step: int,
    transition: str,
    noise_level: float,
    stochastic_steps: tuple[int, ...],
    shared_noise: bool,
) -> Trajectory:
    """Roll out G images a prompt, stochastic only at the given steps, and keep the states there.

    With shared noise the steps before the first stochastic one are computed once a prompt. `branches` are those of
    the P prompts, without prefix.

    Returns:
        trajectory of N = P G samples, members of a group side by side.
    """
    ids = [i for i in prompts.ids for _ in range(group_size)]
    members = list(range(group_size)) * len(prompts)
    branches = branches.cached(model)
    grouped = branches.repeat_interleave(group_size)
    start, prefix_end = 0, stochastic_steps[0] if shared_noise and stochastic_steps else 0
    if shared_noise:
        noise = sampler.initial_noise(model, step=step, ids=prompts.ids, members=[0] * len(prompts))
        if prefix_end:
            single = guided_velocity(model, branches.conditional, branches.unconditional, sampler.guidance)
            noise = rollout(single, noise, sampler.sigmas, stop=prefix_end).latents
            start = prefix_end
        noise = noise.repeat_interleave(group_size, dim=0)
    else:
        noise = sampler.initial_noise(model, step=step, ids=ids, members=members)

    def step_noise(index: int) -> Tensor:
        drawn = batch_noise(
            tuple(noise.shape[1:]),
            seed=sampler.seed,
            step=step,
            ids=ids,
            members=members,
            stream=Stream.STEP,
            index=index,
        )
        return drawn.to(noise.device)

    return rollout(
        guided_velocity(model, grouped.conditional, grouped.unconditional, sampler.guidance),
        noise,
        sampler.sigmas,
        kind=transition,
        noise_level=noise_level,
        stochastic_steps=stochastic_steps,
        step_noise=step_noise,
        start=start,
    )
