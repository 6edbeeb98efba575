"""DiffusionNFT as an objective: what a rollout's clean latents become (arXiv 2509.16117).

Shapes: N samples, S latent tokens, C latent channels, K noise levels a sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from flow_rl.distributed.devices import to_device
from flow_rl.errors import check_above_zero, check_at_least
from flow_rl.flow.noise import Stream, batch_noise, keyed_generator
from flow_rl.flow.objectives import nft_loss
from flow_rl.flow.schedule import noise_latents
from flow_rl.flow.windows import WindowSettings
from flow_rl.messages import warn_on_first_rank
from flow_rl.models import ImageModel
from flow_rl.rl.objectives.base import (
    SETTINGS,
    Metrics,
    Objective,
    Pairs,
    Rollout,
    micro_batches,
)
from flow_rl.rl.settings import RolloutSettings, named_levels


class NFT(Objective):
    """DiffusionNFT: forward-process matching towards good and away from bad samples of the old policy.

    With a single update and an old policy that follows at once, the old velocity is the new one, detached: neither
    a copy of the weights nor a second forward is needed.

    Args:
        beta: how far the implicit policies lie from the old one.
        num_levels: noise levels drawn a sample and update.
        sigma_low: the lowest noise level trained.
        sigma_high: the highest noise level trained.
        common_noise: the members of a group are noised alike, which cancels most of the gradient's noise and leaves
            its mean.
        reference_weight: of the squared distance to the velocity before training; 0 needs no reference.
        old_decay: the old policy follows as old <- decay old + (1 - decay) new after each rollout's updates. The decay
            starts at 0 and grows by `old_decay_growth` an iteration up to this.
        old_decay_growth: see `old_decay`.
        **common: see `Objective`.
    """

    prepares_each_update = True
    charts: ClassVar = {"error of the implicit policies": ("^update/(positive|negative)_loss$",)}

    def __init__(
        self,
        *,
        beta: float = 1.0,
        num_levels: int = 1,
        sigma_low: float = 0.0,
        sigma_high: float = 1.0,
        common_noise: bool = True,
        reference_weight: float = 1e-4,
        old_decay: float = 0.5,
        old_decay_growth: float = 0.01,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.beta = beta
        self.num_levels = num_levels
        self.sigma_low, self.sigma_high = sigma_low, sigma_high
        self.common_noise = common_noise
        self.reference_weight = reference_weight
        self.old_decay, self.old_decay_growth = old_decay, old_decay_growth

    @property
    def uses_old_policy(self) -> bool:
        """See `Objective.uses_old_policy`."""
        return self.updates > 1 or self.old_decay > 0

    @property
    def uses_reference(self) -> bool:
        """See `Objective.uses_reference`."""
        return self.reference_weight > 0

    def pairs_per_sample(self, settings: RolloutSettings) -> int:
        """See `Objective.pairs_per_sample`."""
        return self.num_levels

    def old_decay_at(self, iteration: int) -> float:
        """See `Objective.old_decay_at`."""
        return min(self.old_decay_growth * (iteration + 1), self.old_decay)

    def check(self, settings: RolloutSettings, sigmas: Sequence[float]) -> None:
        """See `Objective.check`."""
        super().check(settings, sigmas)
        check_at_least(1, SETTINGS, num_levels=self.num_levels)
        check_above_zero(SETTINGS, beta=self.beta)
        # Below 0 they would reward distance, or carry the old policy away from the new one.
        check_at_least(0, SETTINGS, reference_weight=self.reference_weight, old_decay_growth=self.old_decay_growth)
        if settings.transition != "ode":
            raise ValueError(
                f"The NFT objective trains on ODE rollouts, but model.rollout.transition is '{settings.transition}'. "
                "Set it to 'ode'."
            )
        if settings.window != WindowSettings():
            warn_on_first_rank(
                "model.rollout.window has no effect under NFT, which has no stochastic steps. The noise levels that "
                f"it trains are between {SETTINGS}.sigma_low and sigma_high."
            )
        if settings.shared_noise:
            raise ValueError(
                "model.rollout.shared_noise with ODE rollouts makes all images of a group identical: every advantage "
                "would be 0. Set shared_noise to false."
            )
        if settings.cfg == "both":
            raise ValueError("model.rollout.cfg 'both' has no meaning for NFT, which never guides its objective.")
        self._check_levels(sigmas)
        if not 0 <= self.old_decay < 1:
            raise ValueError(f"{SETTINGS}.old_decay is {self.old_decay}; it must lie in [0, 1).")
        if self.old_decay > 0 and self.old_decay_growth == 0:
            raise ValueError(
                f"{SETTINGS}.old_decay is {self.old_decay}, but with old_decay_growth 0 it is never reached: the old "
                "policy would follow at once. Set old_decay to 0 to mean that, or a growth above 0."
            )

    def _check_levels(self, sigmas: Sequence[float]) -> None:
        low, high = self.sigma_low, self.sigma_high
        if not 0 <= low < high <= 1:
            raise ValueError(f"{SETTINGS}.sigma_low {low} and sigma_high {high} must satisfy 0 <= low < high <= 1.")
        if not any(low <= float(sigma) <= high for sigma in sigmas[:-1]):
            raise ValueError(
                f"{SETTINGS}.sigma_low {low} to sigma_high {high} holds no noise level at which the rollout asks the "
                f"model ({named_levels(sigmas)}): what is trained would never shape an image. Widen the range."
            )

    def draws(self, rollout: Rollout, update: int) -> tuple[Tensor, Tensor]:
        """Noise levels (K, N) and noised latents (K, N, S, C), keyed by prompt, iteration and update.

        With common noise the members of a group share level and noise. Each member's own draw is distributed as
        before, so the gradient's mean is the same; but advantages sum to 0 in a group, so what the members have in
        common, the noise above all, cancels from it.
        """
        x_0 = rollout.trajectory.latents
        members = [0] * len(rollout.members) if self.common_noise else rollout.members
        sigmas, noised = [], []
        for k in range(self.num_levels):
            key = {"seed": rollout.seed, "step": rollout.iteration, "index": update * self.num_levels + k}
            uniform = torch.stack(
                [
                    torch.rand((), generator=keyed_generator(sample_id=i, member=m, stream=Stream.TIMESTEP, **key))
                    for i, m in zip(rollout.ids, members, strict=True)
                ]
            )
            sigma = self.sigma_low + uniform * (self.sigma_high - self.sigma_low)
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

    def prepare_reference(
        self, model: ImageModel, rollout: Rollout, prepared: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """See `Objective.prepare_reference`: the velocity at the states that are prepared."""
        return {"velocity_reference": self._velocities(model, rollout, prepared)}

    @torch.no_grad()
    def _velocities(self, model: ImageModel, rollout: Rollout, prepared: Mapping[str, Tensor]) -> Tensor:
        """Velocity (K, N, S, C) of the weights applied now at the prepared states."""
        samples, steps = len(rollout.conditioning), self.num_levels
        made = [
            model.velocity(
                prepared["x_t"][pairs.step, pairs.sample],
                prepared["sigma"][pairs.step, pairs.sample],
                rollout.conditioning.select(pairs.samples),
            )
            for pairs in micro_batches(samples, steps, self.micro_batch_size, rollout.device)
        ]
        return torch.cat(made).unflatten(0, (samples, steps)).transpose(0, 1)

    def loss(
        self,
        model: ImageModel,
        rollout: Rollout,
        advantages: Tensor,
        pairs: Pairs,
        prepared: Mapping[str, Tensor],
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
            beta=self.beta,
            advantage_max=self.advantage_clip,
            velocity_ref=at.get("velocity_reference"),
            kl_weight=self.reference_weight * self.reference_scale,
            denominator=denominator,
        )
