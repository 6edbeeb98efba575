"""From one rollout to micro-batch losses: the policy gradient (clipped, guarded) and NFT.

Both share three steps: `prepare` what is constant over a rollout's updates, cut the (sample, step) pairs into
micro-batches, and give each micro-batch's share of the full-batch loss. Pairs are ordered prompt by prompt, so a
micro-batch shares text prefixes; no result depends on the cut.

Shapes: P prompts, N samples, S latent tokens, C latent channels, K trained steps a sample, M pairs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from datamodules.batches import Prompts
from flow.guidance import guide
from flow.noise import Stream, batch_noise, keyed_generator
from flow.objectives import clipped_policy_loss, guarded_policy_loss, nft_loss
from flow.rollout import Trajectory
from flow.schedule import noise_latents
from flow.transitions import transition
from lightning_modules.settings import ObjectiveSettings, RolloutSettings
from models import Conditioning, ImageModel

Metrics = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """What an update knows of a rollout.

    Attributes:
        prompts: P prompts.
        trajectory: final latents (N, S, C) and, at the stochastic steps, states and next states (K, N, S, C).
        sigmas: the schedule (T + 1,).
        conditioning: of the N samples.
        unconditional: of the N samples with a blank prompt; None unless guidance is part of the objective.
        members: which image of its group each sample is, length N.
        iteration: keys this iteration's noise.
        seed: of the noise.
    """

    prompts: Prompts
    trajectory: Trajectory
    sigmas: Tensor
    conditioning: Conditioning
    unconditional: Conditioning | None
    members: tuple[int, ...]
    iteration: int
    seed: int

    @property
    def ids(self) -> list[int]:
        """Prompt id of each sample."""
        return [self.prompts.ids[row] for row in self.conditioning.rows.tolist()]


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """M (sample, step) pairs: indices into the N samples and the K steps, each int64 (M,)."""

    sample: Tensor
    step: Tensor

    def __len__(self) -> int:
        return self.sample.shape[0]


def micro_batches(num_samples: int, num_steps: int, size: int) -> Iterator[Pairs]:
    """All pairs, sample by sample, in pieces of at most `size`."""
    index = torch.arange(num_samples * num_steps)
    for piece in index.split(size):
        yield Pairs(sample=piece // num_steps, step=piece % num_steps)


class Objective(ABC):
    """How a rollout turns into losses.

    Args:
        rollout_settings: how the rollout was made.
        settings: of the objective.
    """

    #: whether rollout and `prepare` see the old policy's weights rather than the policy's own
    uses_old_policy = False
    #: whether `prepare_reference` needs the weights from before training
    uses_reference = False
    #: whether the rollout is stochastic at the steps of a window
    uses_window = False

    def __init__(self, rollout_settings: RolloutSettings, settings: ObjectiveSettings) -> None:
        self.rollout_settings = rollout_settings
        self.settings = settings

    @abstractmethod
    def steps_a_sample(self, rollout: Rollout) -> int:
        """K, the number of pairs each sample gives an update."""

    @abstractmethod
    def prepare(self, model: ImageModel, rollout: Rollout, update: int) -> dict[str, Tensor]:
        """What the weights before the update give, as (K, N, ...) tensors by name, computed without gradient."""

    def prepare_reference(self, model: ImageModel, rollout: Rollout, prepared: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the reference weights, applied now, add to `prepared`."""
        return {}

    @abstractmethod
    def loss(
        self,
        model: ImageModel,
        rollout: Rollout,
        advantages: Tensor,
        pairs: Pairs,
        prepared: dict[str, Tensor],
        denominator: int,
    ) -> tuple[Tensor, Metrics]:
        """This micro-batch's share of the mean over `denominator` pairs, and its detached metrics."""


class PolicyGradient(Objective):
    """The clipped (or guarded) policy gradient on the stochastic steps, ratio cond / cond.

    The old log-probability is that of the stored next state under the same velocity as the new one, in micro-batches
    of the same shape: the ratio is exactly 1 at the first update, whatever guidance drew the states.
    """

    uses_window = True

    def steps_a_sample(self, rollout: Rollout) -> int:
        """See `Objective.steps_a_sample`."""
        return len(rollout.trajectory.steps)

    def prepare(self, model: ImageModel, rollout: Rollout, update: int) -> dict[str, Tensor]:
        """See `Objective.prepare`. With a single update the old values are the new ones, detached: no forward."""
        if self.settings.updates == 1 or update > 0:
            return {}
        samples, steps = len(rollout.conditioning), self.steps_a_sample(rollout)
        kept: dict[str, list[Tensor]] = {"log_prob": [], "mean": []}
        for pairs in micro_batches(samples, steps, self.settings.micro_batch_size):
            # Grad stays enabled so that the very same kernels run as in the update: the ratio must be exactly 1.
            log_prob, mean, _, _ = self._step(model, rollout, pairs)
            kept["log_prob"].append(log_prob.detach())
            kept["mean"].append(mean.detach())
        return {name: torch.cat(values).unflatten(0, (samples, steps)).transpose(0, 1) for name, values in kept.items()}

    def _step(self, model: ImageModel, rollout: Rollout, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log-prob (M,), mean (M, S, C), std (M, 1, 1) and dt (M,) of the stored steps under today's weights."""
        trajectory, settings = rollout.trajectory, self.rollout_settings
        index = torch.tensor(trajectory.steps)[pairs.step]
        sigma, sigma_next = rollout.sigmas[index], rollout.sigmas[index + 1]
        x = trajectory.states[pairs.step, pairs.sample]
        device = x.device
        velocity = self._velocity(model, rollout, pairs, x, sigma.to(device))
        step = transition(
            settings.transition,
            x,
            velocity,
            sigma.to(device),
            sigma_next.to(device),
            noise_level=settings.noise_level,
            sigma_cap=float(rollout.sigmas[1]),
        )
        log_prob = step.log_prob(trajectory.next_states[pairs.step, pairs.sample])
        return log_prob, step.mean, torch.as_tensor(step.std), (sigma_next - sigma).to(device)

    def _velocity(self, model: ImageModel, rollout: Rollout, pairs: Pairs, x: Tensor, sigma: Tensor) -> Tensor:
        conditional = rollout.conditioning.select(pairs.sample)
        guidance = self.rollout_settings.guidance
        velocity = model.velocity(x, sigma, conditional)
        if rollout.unconditional is None:
            return velocity
        blank = model.velocity(x, sigma, rollout.unconditional.select(pairs.sample))
        active = torch.tensor([guidance.active(float(s)) for s in sigma], device=x.device)
        guided = guide(velocity, blank, guidance.scale, rescale=guidance.rescale)
        return torch.where(active[:, None, None], guided, velocity)

    def loss(
        self,
        model: ImageModel,
        rollout: Rollout,
        advantages: Tensor,
        pairs: Pairs,
        prepared: dict[str, Tensor],
        denominator: int,
    ) -> tuple[Tensor, Metrics]:
        """See `Objective.loss`."""
        log_prob, mean, std, dt = self._step(model, rollout, pairs)
        old = {name: values[pairs.step, pairs.sample] for name, values in prepared.items()}
        log_prob_old = old.get("log_prob", log_prob.detach())
        advantage = advantages[pairs.sample].to(log_prob.device)
        if self.settings.kind == "guarded":
            return guarded_policy_loss(
                log_prob,
                log_prob_old,
                advantage,
                mean=mean,
                mean_old=old.get("mean", mean.detach()),
                std=std,
                dt=dt,
                clip_range=self.settings.clip_range,
                denominator=denominator,
            )
        return clipped_policy_loss(
            log_prob, log_prob_old, advantage, clip_range=self.settings.clip_range, denominator=denominator
        )


class NFT(Objective):
    """DiffusionNFT: forward-process matching towards good and away from bad samples of the old policy.

    With a single update and an old policy that follows at once, the old velocity is the new one, detached: neither
    a copy of the weights nor a second forward is needed.
    """

    def __init__(self, rollout_settings: RolloutSettings, settings: ObjectiveSettings) -> None:
        super().__init__(rollout_settings, settings)
        self.uses_old_policy = settings.updates > 1 or settings.old_decay > 0
        self.uses_reference = settings.nft_reference_weight > 0

    def steps_a_sample(self, rollout: Rollout) -> int:
        """See `Objective.steps_a_sample`."""
        return self.settings.nft_steps

    def draws(self, rollout: Rollout, update: int) -> tuple[Tensor, Tensor]:
        """Noise levels (K, N) and noised latents (K, N, S, C), keyed by prompt, iteration and update.

        With common noise the members of a group share level and noise. Each member's own draw is distributed as
        before, so the gradient's mean is the same; but advantages sum to 0 in a group, so what the members have in
        common, the noise above all, cancels from it.
        """
        settings, x_0 = self.settings, rollout.trajectory.latents
        members = [0] * len(rollout.members) if settings.nft_common_noise else rollout.members
        sigmas, noised = [], []
        for k in range(settings.nft_steps):
            key = {"seed": rollout.seed, "step": rollout.iteration, "index": update * settings.nft_steps + k}
            uniform = torch.stack(
                [
                    torch.rand((), generator=keyed_generator(sample_id=i, member=m, stream=Stream.TIMESTEP, **key))
                    for i, m in zip(rollout.ids, members, strict=True)
                ]
            )
            sigma = settings.nft_sigma_low + uniform * (settings.nft_sigma_high - settings.nft_sigma_low)
            shape = tuple(x_0.shape[1:])
            noise = batch_noise(shape, ids=rollout.ids, members=members, stream=Stream.FORWARD, **key)
            sigmas.append(sigma.to(x_0.device))
            noised.append(noise_latents(x_0, noise.to(x_0.device), sigmas[-1]))
        return torch.stack(sigmas), torch.stack(noised)

    def prepare(self, model: ImageModel, rollout: Rollout, update: int) -> dict[str, Tensor]:
        """See `Objective.prepare`: noise levels, noised latents and, with an old policy, its velocity there."""
        sigma, x_t = self.draws(rollout, update)
        prepared = {"sigma": sigma, "x_t": x_t}
        if self.uses_old_policy:
            prepared["velocity_old"] = self._velocities(model, rollout, prepared)
        return prepared

    def prepare_reference(self, model: ImageModel, rollout: Rollout, prepared: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Objective.prepare_reference`: the velocity at the states that are prepared."""
        return {"velocity_reference": self._velocities(model, rollout, prepared)}

    @torch.no_grad()
    def _velocities(self, model: ImageModel, rollout: Rollout, prepared: dict[str, Tensor]) -> Tensor:
        """Velocity (K, N, S, C) of the weights applied now at the prepared states."""
        samples, steps = len(rollout.conditioning), self.settings.nft_steps
        made = [
            model.velocity(
                prepared["x_t"][pairs.step, pairs.sample],
                prepared["sigma"][pairs.step, pairs.sample],
                rollout.conditioning.select(pairs.sample),
            )
            for pairs in micro_batches(samples, steps, self.settings.micro_batch_size)
        ]
        return torch.cat(made).unflatten(0, (samples, steps)).transpose(0, 1)

    def loss(
        self,
        model: ImageModel,
        rollout: Rollout,
        advantages: Tensor,
        pairs: Pairs,
        prepared: dict[str, Tensor],
        denominator: int,
    ) -> tuple[Tensor, Metrics]:
        """See `Objective.loss`."""
        at = {name: values[pairs.step, pairs.sample] for name, values in prepared.items()}
        velocity = model.velocity(at["x_t"], at["sigma"], rollout.conditioning.select(pairs.sample))
        return nft_loss(
            velocity,
            at.get("velocity_old", velocity.detach()),
            at["x_t"],
            rollout.trajectory.latents[pairs.sample],
            at["sigma"],
            advantages[pairs.sample].to(velocity.device),
            beta=self.settings.nft_beta,
            advantage_max=self.settings.advantage_clip,
            velocity_ref=at.get("velocity_reference"),
            kl_weight=self.settings.nft_reference_weight,
            denominator=denominator,
        )


OBJECTIVES: dict[str, type[Objective]] = {"clipped": PolicyGradient, "guarded": PolicyGradient, "nft": NFT}
