"""Policy gradients on the stochastic steps of a rollout: Flow-GRPO's clipped ratio and GRPO-Guard's centred one.

Shapes: N samples, S latent tokens, C latent channels, K trained steps a sample, M pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flow_rl.distributed.devices import to_device
from flow_rl.flow.guidance import guide
from flow_rl.flow.objectives import clipped_policy_loss, guarded_policy_loss, kl_to_reference, step_weights
from flow_rl.flow.transitions import transition
from flow_rl.models import ImageModel
from flow_rl.rl.objectives.base import Metrics, Objective, Pairs, Rollout, micro_batches
from flow_rl.rl.settings import ObjectiveSettings, RolloutSettings


@dataclass(frozen=True, kw_only=True)
class ReplayedStep:
    """Stored steps under the weights applied now.

    Attributes:
        log_prob: of the stored next states, (M,).
        mean: of the transition, (M, S, C).
        std: of the transition, `sqrt(-dt)` included, (M, 1, 1).
        dt: sigma_next - sigma, (M,).
    """

    log_prob: Tensor
    mean: Tensor
    std: Tensor
    dt: Tensor

    @property
    def noise_rate(self) -> Tensor:
        """Noise `s = std / sqrt(-dt)`, (M,): the scale that published KL coefficients go with."""
        return self.std.flatten() / (-self.dt).sqrt()


class PolicyGradient(Objective):
    """The clipped (or guarded) policy gradient on the stochastic steps, ratio cond / cond.

    The old log-probability is that of the stored next state under the same velocity as the new one, in micro-batches
    of the same shape: the ratio is exactly 1 at the first update, whatever guidance drew the states. Several updates
    share the old values of the weights that drew the rollout.
    """

    uses_window = True

    def __init__(self, rollout_settings: RolloutSettings, settings: ObjectiveSettings) -> None:
        super().__init__(rollout_settings, settings)
        self.uses_reference = settings.kl_weight > 0

    def steps_a_sample(self, rollout: Rollout) -> int:
        """See `Objective.steps_a_sample`."""
        return len(rollout.trajectory.steps)

    def prepare(self, model: ImageModel, rollout: Rollout, update: int) -> dict[str, Tensor]:
        """See `Objective.prepare`. With a single update the old values are the new ones, detached: no forward."""
        assert update == 0, "the old values are those of the weights before the first update"
        if self.settings.updates == 1:
            return {}
        return self._replay_all(model, rollout, {"log_prob": "log_prob", "mean": "mean"})

    def prepare_reference(self, model: ImageModel, rollout: Rollout, prepared: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Objective.prepare_reference`: the reference's mean at the stored states."""
        return self._replay_all(model, rollout, {"mean_reference": "mean"})

    def _replay_all(self, model: ImageModel, rollout: Rollout, kept: dict[str, str]) -> dict[str, Tensor]:
        """Attributes of every pair's `ReplayedStep`, each (K, N, ...), under the names that `kept` gives them."""
        samples, steps = len(rollout.conditioning), self.steps_a_sample(rollout)
        values: dict[str, list[Tensor]] = {name: [] for name in kept}
        for pairs in micro_batches(samples, steps, self.settings.micro_batch_size, rollout.device):
            # Grad stays enabled so that the very same kernels run as in the update: the ratio must be exactly 1.
            step = self._replay(model, rollout, pairs)
            for name, attribute in kept.items():
                values[name].append(getattr(step, attribute).detach())
        return {name: torch.cat(parts).unflatten(0, (samples, steps)).transpose(0, 1) for name, parts in values.items()}

    def _replay(self, model: ImageModel, rollout: Rollout, pairs: Pairs) -> ReplayedStep:
        trajectory, settings = rollout.trajectory, self.rollout_settings
        x = trajectory.states[pairs.step, pairs.sample]
        sigma, sigma_next = (levels[pairs.step] for levels in rollout.step_sigmas)
        step = transition(
            settings.transition,
            x,
            self._velocity(model, rollout, pairs, x, sigma),
            sigma,
            sigma_next,
            noise_level=settings.noise_level,
            sigma_cap=float(rollout.sigmas[1]),
        )
        log_prob = step.log_prob(trajectory.next_states[pairs.step, pairs.sample])
        return ReplayedStep(log_prob=log_prob, mean=step.mean, std=step.std, dt=sigma_next - sigma)

    def _velocity(self, model: ImageModel, rollout: Rollout, pairs: Pairs, x: Tensor, sigma: Tensor) -> Tensor:
        guidance = self.rollout_settings.guidance
        velocity = model.velocity(x, sigma, rollout.conditioning.select(pairs.samples))
        if rollout.unconditional is None:
            return velocity
        blank = model.velocity(x, sigma, rollout.unconditional.select(pairs.samples))
        guided = guide(velocity, blank, guidance.scale, rescale=guidance.rescale)
        return torch.where(guidance.active_rows(sigma)[:, None, None], guided, velocity)

    def _step_weights(self, rollout: Rollout) -> Tensor:
        """The weight of each of the K trained steps."""
        index = torch.tensor(rollout.trajectory.steps)
        nothing = torch.zeros(len(index), 1)  # the std depends on the noise levels alone
        sigmas, settings = rollout.sigmas, self.rollout_settings
        step = transition(
            settings.transition,
            nothing,
            nothing,
            sigmas[index],
            sigmas[index + 1],
            noise_level=settings.noise_level,
            sigma_cap=float(sigmas[1]),
        )
        return to_device(step_weights(step.std.flatten()), rollout.device)

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
        assert self.settings.updates == 1 or "log_prob" in prepared, "several updates need the stored old log-probs"
        step = self._replay(model, rollout, pairs)
        at = {name: values[pairs.step, pairs.sample] for name, values in prepared.items()}
        weights = None
        if self.settings.step_weights == "noise":
            weights = self._step_weights(rollout)[pairs.step]
        common = {
            "log_prob": step.log_prob,
            "log_prob_old": at.get("log_prob", step.log_prob.detach()),
            "advantages": advantages[pairs.sample].to(step.log_prob.device),
            "clip_range": self.settings.clip_range,
            "weights": weights,
            "denominator": denominator,
        }
        if self.settings.kind == "guarded":
            mean_old = at.get("mean", step.mean.detach())
            loss, metrics = guarded_policy_loss(**common, mean=step.mean, mean_old=mean_old, std=step.std, dt=step.dt)
        else:
            loss, metrics = clipped_policy_loss(**common)
        if "mean_reference" in at:
            kl = kl_to_reference(step.mean, at["mean_reference"], step.noise_rate)
            loss = loss + self.settings.kl_weight * kl.sum() / denominator
            metrics = metrics | {"kl": kl.detach().mean()}
        return loss, metrics
