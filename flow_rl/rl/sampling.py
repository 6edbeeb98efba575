"""Drawing images from an `ImageModel`: guidance, keyed noise, groups.

Images are drawn in three stages: encode the prompts, denoise, decode. Under FSDP2 the transformer is whole on every
rank while it denoises, and nothing else is: neither the text encoder nor the activations of the image decoder would
fit beside it.

Shapes: P prompts, G images a prompt, N = P G samples, S latent tokens, C latent channels, K recorded steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flow_rl.batches import Prompts
from flow_rl.distributed.devices import to_device
from flow_rl.distributed.sharding import gathered, release
from flow_rl.flow.guidance import Guidance, guide
from flow_rl.flow.noise import Stream, batch_noise
from flow_rl.flow.rollout import Trajectory, rollout
from flow_rl.models import Conditioning, ImageModel
from flow_rl.rl.settings import RolloutSettings

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

    @property
    def device(self) -> torch.device:
        """Where the branches were computed, and where the latents that go with them belong."""
        return self.conditional.embeds[0].device

    def _each(self, change: Callable[[Conditioning], Conditioning]) -> Branches:
        blank = self.unconditional
        return Branches(conditional=change(self.conditional), unconditional=None if blank is None else change(blank))


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A chunk of prompts that is ready to be denoised.

    Attributes:
        prompts: P of them.
        members: images a prompt.
        branches: of the P prompts.
    """

    prompts: Prompts
    members: int
    branches: Branches


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
        device: torch.device = torch.device("cpu"),  # noqa: B008  (immutable)
        stream: Stream = Stream.INITIAL,
    ) -> Tensor:
        """Noise (N, S, C) that depends on (seed, step, id, member) alone, whatever else is in the batch."""
        shape = model.latent_shape(*self.size)
        noise = batch_noise(shape, seed=self.seed, step=step, ids=ids, members=members, stream=stream)
        return to_device(noise, device)

    @torch.no_grad()
    def images(self, model: ImageModel, prompts: Prompts, *, members: int = 1) -> Tensor:
        """Draw `members` images a prompt by ODE, from noise fixed by (seed, prompt id, member).

        Returns:
            images in [0, 1] on the host, shape (P * members, 3, H, W), members of a prompt side by side.
        """
        chunks = self.encode_chunks(model, prompts, members=members)
        with gathered(model.transformer):
            latents = self.denoise(model, chunks)
        return self.decode(model, latents, members=members)

    def encode_chunks(self, model: ImageModel, prompts: Prompts, *, members: int = 1) -> list[Encoded]:
        """The first stage of `images`: encode the prompts, in chunks that give at most `batch_size` images each.

        Where the text encoder is sharded, every rank must ask for the same number of prompts.
        """
        return [
            Encoded(prompts=part, members=members, branches=self.encode(model, part.texts, part.sources))
            for part in prompts.parts(self._chunk_size(members))
        ]

    def count_chunks(self, prompts: int, *, members: int = 1) -> int:
        """How many chunks `encode_chunks` makes of so many prompts."""
        return math.ceil(prompts / self._chunk_size(members))

    def _chunk_size(self, members: int) -> int:
        """Prompts a chunk, of `members` images each."""
        return max(1, self.batch_size // members)

    @torch.no_grad()
    def denoise(self, model: ImageModel, chunks: Sequence[Encoded]) -> Tensor:
        """The second stage: final latents (P * members, S, C). Gather the transformer around it."""
        latents = []
        for chunk in chunks:
            members = list(range(chunk.members)) * len(chunk.prompts)
            noise = self.initial_noise(
                model,
                step=0,
                ids=[identifier for identifier in chunk.prompts.ids for _ in range(chunk.members)],
                members=members,
                device=chunk.branches.device,
                stream=Stream.EVALUATION,
            )
            seen = chunk.branches.cached(model).repeat_interleave(chunk.members)
            velocity = guided_velocity(model, seen.conditional, seen.unconditional, self.guidance)
            latents.append(rollout(velocity, noise, self.sigmas).latents)
        return torch.cat(latents)

    @torch.no_grad()
    def decode(self, model: ImageModel, latents: Tensor, *, members: int = 1) -> Tensor:
        """The last stage: images in [0, 1] on the host, float32 (N, 3, H, W), from latents (N, S, C).

        The chunks of `encode_chunks` go to the host one by one: the device never holds more images than one has.
        """
        chunks = latents.split(self._chunk_size(members) * members)
        return torch.cat([model.decode(chunk, size=self.size).cpu() for chunk in chunks])

    @torch.no_grad()
    def encode(self, model: ImageModel, texts: Sequence[str], sources: Tensor | None = None) -> Branches:
        """Both branches of P texts. Guidance keeps the source image in both."""
        conditional = model.encode(texts, sources, size=self.size)
        if self.guidance.scale == 1:
            unconditional = None
        elif sources is not None:
            unconditional = model.encode([""] * len(texts), sources, size=self.size)
        else:  # one blank prompt serves them all
            unconditional = model.encode([""], size=self.size).select([0] * len(texts))
        release_encoders(model)
        return Branches(conditional=conditional, unconditional=unconditional)

    def velocity(
        self, model: ImageModel, texts: Sequence[str], sources: Tensor | None = None, *, repeats: int = 1
    ) -> VelocityFn:
        """The guided velocity of each text, `repeats` samples a text, with the prefix computed once."""
        branches = self.encode(model, texts, sources).cached(model).repeat_interleave(repeats)
        return guided_velocity(model, branches.conditional, branches.unconditional, self.guidance)


def release_encoders(model: ImageModel) -> None:
    """Leave nothing of a sharded text encoder whole after it was used.

    FSDP2 keeps a root's own weights after a forward, here the table of token embeddings, for a backward that never
    comes.
    """
    for name, part in model.named_children():
        if name != "transformer":
            release(part)


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
    settings: RolloutSettings,
    *,
    group_size: int,
    step: int,
    stochastic_steps: tuple[int, ...],
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
    start, prefix_end = 0, stochastic_steps[0] if settings.shared_noise and stochastic_steps else 0
    if settings.shared_noise:
        noise = sampler.initial_noise(
            model, step=step, ids=prompts.ids, members=[0] * len(prompts), device=branches.device
        )
        if prefix_end:
            single = guided_velocity(model, branches.conditional, branches.unconditional, sampler.guidance)
            noise = rollout(single, noise, sampler.sigmas, stop=prefix_end).latents
            start = prefix_end
        noise = noise.repeat_interleave(group_size, dim=0)
    else:
        noise = sampler.initial_noise(model, step=step, ids=ids, members=members, device=branches.device)

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
        return to_device(drawn, noise.device)

    return rollout(
        guided_velocity(model, grouped.conditional, grouped.unconditional, sampler.guidance),
        noise,
        sampler.sigmas,
        kind=settings.transition,
        noise_level=settings.noise_level,
        stochastic_steps=stochastic_steps,
        step_noise=step_noise,
        start=start,
    )
