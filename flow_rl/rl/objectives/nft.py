"""DiffusionNFT as an objective: what a rollout's clean latents become (arXiv 2509.16117).

Shapes: N samples, S latent tokens, C latent channels, K noise levels a sample, T denoising steps.
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
from flow_rl.flow.windows import draw_steps, steps_within_reach, window_size
from flow_rl.models import ImageModel
from flow_rl.rl.objectives.base import (
    SETTINGS,
    Metrics,
    Objective,
    Pairs,
    Rollout,
    micro_batches,
)
from flow_rl.rl.settings import RolloutSettings


class NFT(Objective):
    """DiffusionNFT: forward-process matching towards good and away from bad samples of the old policy.

    Each sample trains at noise levels of its own rollout: those of `model.rollout.window`, drawn anew for each sample
    and update. The window `all` trains every sample at all of the solver's steps, as published NFT does.

    With a single update and an old policy that follows at once, the old velocity is the new one, detached: neither
    a copy of the weights nor a second forward is needed.

    Args:
        beta: how far the implicit policies lie from the old one.
        common_noise: the members of a group share noise levels and noise, which cancels most of the gradient's noise
            and leaves its mean.
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
        common_noise: bool = True,
        reference_weight: float = 1e-4,
        old_decay: float = 0.5,
        old_decay_growth: float = 0.01,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.beta = beta
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
        """See `Objective.pairs_per_sample`: the steps of a draw of the window."""
        return window_size(settings.window, settings.num_steps, last=True)

    def old_decay_at(self, iteration: int) -> float:
        """See `Objective.old_decay_at`."""
        return min(self.old_decay_growth * (iteration + 1), self.old_decay)

    def check(self, settings: RolloutSettings, sigmas: Sequence[float]) -> None:
        """See `Objective.check`."""
        super().check(settings, sigmas)
        check_above_zero(SETTINGS, beta=self.beta)
        # Below 0 they would reward distance, or carry the old policy away from the new one.
        check_at_least(0, SETTINGS, reference_weight=self.reference_weight, old_decay_growth=self.old_decay_growth)
        if settings.transition != "ode":
            raise ValueError(
                f"The NFT objective trains on ODE rollouts, but model.rollout.transition is '{settings.transition}'. "
                "Set it to 'ode'."
            )
        if settings.shared_noise:
            raise ValueError(
                "model.rollout.shared_noise with ODE rollouts makes all images of a group identical: every advantage "
                "would be 0. Set shared_noise to false."
            )
        if settings.cfg == "both":
            raise ValueError("model.rollout.cfg 'both' has no meaning for NFT, which never guides its objective.")
        steps_within_reach(
            settings.window, settings.num_steps, last=True
        )  # refuses a window that does not fit the schedule
        if not 0 <= self.old_decay < 1:
            raise ValueError(f"{SETTINGS}.old_decay is {self.old_decay}; it must lie in [0, 1).")
        if self.old_decay > 0 and self.old_decay_growth == 0:
            raise ValueError(
                f"{SETTINGS}.old_decay is {self.old_decay}, but with old_decay_growth 0 it is never reached: the old "
                "policy would follow at once. Set old_decay to 0 to mean that, or a growth above 0."
            )

    def draws(self, rollout: Rollout, update: int) -> tuple[Tensor, Tensor]:
        """Noise levels (K, N) and noised latents (K, N, S, C), keyed by prompt, iteration and update.

        A sample's levels are those before K distinct steps of its rollout, drawn by the rule of the window.

        With common noise the members of a group share levels and noise. Each member's own draw is distributed as
        before, so the gradient's mean is the same. But advantages sum to 0 in a group, so what the members have in
        common, above all the noise, cancels from it.
        """
        x_0 = rollout.trajectory.latents
        members = [0] * len(rollout.members) if self.common_noise else rollout.members
        sigmas = to_device(self._levels(rollout, members, update), x_0.device)
        noised = []
        for k, sigma in enumerate(sigmas):
            noise = batch_noise(
                tuple(x_0.shape[1:]),
                ids=rollout.ids,
                members=members,
                stream=Stream.FORWARD,
                seed=rollout.seed,
                step=rollout.iteration,
                index=update * len(sigmas) + k,
            )
            noised.append(noise_latents(x_0, to_device(noise, x_0.device), sigma))
        return sigmas, torch.stack(noised)

    def _levels(self, rollout: Rollout, members: Sequence[int], update: int) -> Tensor:
        """Each sample's noise levels, (K, N), on the host."""
        num_steps = len(rollout.sigmas) - 1
        key = {"seed": rollout.seed, "step": rollout.iteration, "index": update}
        drawn = [
            draw_steps(
                rollout.settings.window,
                num_steps,
                iteration=rollout.iteration,
                generator=keyed_generator(stream=Stream.TIMESTEP, sample_id=sample_id, member=member, **key),
                last=True,
            )
            for sample_id, member in zip(rollout.ids, members, strict=True)
        ]
        return rollout.sigmas[torch.tensor(drawn).T]

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
        steps, samples = prepared["sigma"].shape
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
        weights: Tensor | None = None,
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
            weights=None if weights is None else weights[pairs.sample],
            denominator=denominator,
        )
