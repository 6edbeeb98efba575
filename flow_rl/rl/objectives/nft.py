"""DiffusionNFT as an objective: what a rollout's clean latents become (arXiv 2509.16117).

Shapes: N samples, S latent tokens, C latent channels, K noise levels a sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flow_rl.distributed.devices import to_device
from flow_rl.flow.noise import Stream, batch_noise, keyed_generator
from flow_rl.flow.objectives import nft_loss
from flow_rl.flow.schedule import noise_latents
from flow_rl.models import ImageModel
from flow_rl.rl.objectives.base import Metrics, Objective, Pairs, Rollout, micro_batches
from flow_rl.rl.settings import ObjectiveSettings, RolloutSettings


class NFT(Objective):
    """DiffusionNFT: forward-process matching towards good and away from bad samples of the old policy.

    With a single update and an old policy that follows at once, the old velocity is the new one, detached: neither
    a copy of the weights nor a second forward is needed.
    """

    prepares_each_update = True

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
            sigmas.append(to_device(sigma, x_0.device))
            noised.append(noise_latents(x_0, to_device(noise, x_0.device), sigmas[-1]))
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
                rollout.conditioning.select(pairs.samples),
            )
            for pairs in micro_batches(samples, steps, self.settings.micro_batch_size, rollout.device)
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
        velocity = model.velocity(at["x_t"], at["sigma"], rollout.conditioning.select(pairs.samples))
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
