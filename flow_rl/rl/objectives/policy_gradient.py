"""Policy gradients on the stochastic steps of a rollout: Flow-GRPO's clipped ratio and GRPO-Guard's centred one.

Shapes: N samples, S latent tokens, C latent channels, K trained steps a sample, M pairs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from flow_rl.distributed.devices import to_device
from flow_rl.errors import check_above_zero, check_at_least
from flow_rl.flow.guidance import guide
from flow_rl.flow.objectives import clipped_policy_loss, guarded_policy_loss, kl_to_reference, step_weights
from flow_rl.flow.transitions import transition
from flow_rl.flow.windows import window_size
from flow_rl.models import ImageModel
from flow_rl.rl.objectives.base import (
    SETTINGS,
    Metrics,
    Objective,
    Pairs,
    Rollout,
    micro_batches,
)
from flow_rl.rl.objectives.policy_gradient_checks import (
    check_clip_range,
    check_credit,
    check_step_weights,
    check_transition,
)
from flow_rl.rl.settings import RolloutSettings


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
    """A policy gradient on the stochastic steps, ratio cond / cond.

    The old log-probability is that of the stored next state under the same velocity as the new one, in micro-batches
    of the same shape: the ratio is exactly 1 at the first update, whatever guidance drew the states. Several updates
    share the old values of the weights that drew the rollout.

    Args:
        clip_range: half-width of the trust interval of the ratio, whose logarithm is a mean over dimensions.
        step_weights: noise weights each trained step's loss by the noise it adds, over the mean of the trained steps
            (TempFlow-GRPO).
        kl_weight: of the KL divergence to the weights before training; 0 needs no reference.
        **common: see `Objective`.
    """

    samples_stochastically = True
    charts: ClassVar = {"ratio and clipping": ("^update/.*ratio.*", "^update/.*clip.*")}

    def __init__(
        self,
        *,
        clip_range: float,
        step_weights: Literal["uniform", "noise"] = "uniform",
        kl_weight: float = 0.0,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.clip_range = clip_range
        self.step_weights = step_weights
        self.kl_weight = kl_weight

    @property
    def uses_reference(self) -> bool:
        """See `Objective.uses_reference`."""
        return self.kl_weight > 0

    @property
    def prepares_forwards(self) -> bool:
        """See `Objective.prepares_forwards`."""
        return self.updates > 1

    def pairs_per_sample(self, settings: RolloutSettings) -> int:
        """See `Objective.pairs_per_sample`: the steps of the window, as many in every iteration."""
        return window_size(settings.window, settings.num_steps)

    def check(self, settings: RolloutSettings, sigmas: Sequence[float]) -> None:
        """See `Objective.check`."""
        super().check(settings, sigmas)
        check_at_least(0, SETTINGS, kl_weight=self.kl_weight)  # below 0 it would reward distance
        check_above_zero(SETTINGS, clip_range=self.clip_range)
        check_transition(settings, sigmas, objective=type(self).__name__)
        check_step_weights(settings, self.step_weights)
        check_clip_range(self.clip_range, self.updates)
        check_credit(settings, sigmas)

    def prepare(self, model: ImageModel, rollout: Rollout, update: int) -> dict[str, Tensor]:
        """See `Objective.prepare`. With a single update the old values are the new ones, detached: no forward."""
        assert update == 0, "the old values are those of the weights before the first update"
        if self.updates == 1:
            return {}
        return self._replay_all(model, rollout, {"log_prob": "log_prob", "mean": "mean"})

    def prepare_reference(
        self, model: ImageModel, rollout: Rollout, prepared: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """See `Objective.prepare_reference`: the reference's mean at the stored states."""
        return self._replay_all(model, rollout, {"mean_reference": "mean"})

    def _replay_all(self, model: ImageModel, rollout: Rollout, kept: dict[str, str]) -> dict[str, Tensor]:
        """Attributes of every pair's `ReplayedStep`, each (K, N, ...), under the names that `kept` gives them."""
        samples, steps = len(rollout.conditioning), len(rollout.trajectory.steps)
        values: dict[str, list[Tensor]] = {name: [] for name in kept}
        for pairs in micro_batches(samples, steps, self.micro_batch_size, rollout.device):
            # Grad stays enabled so that the very same kernels run as in the update: the ratio must be exactly 1.
            step = self._replay(model, rollout, pairs)
            for name, attribute in kept.items():
                values[name].append(getattr(step, attribute).detach())
        return {name: torch.cat(parts).unflatten(0, (samples, steps)).transpose(0, 1) for name, parts in values.items()}

    def _replay(self, model: ImageModel, rollout: Rollout, pairs: Pairs) -> ReplayedStep:
        trajectory, settings = rollout.trajectory, rollout.settings
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
        guidance = rollout.settings.guidance
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
        sigmas, settings = rollout.sigmas, rollout.settings
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
        prepared: Mapping[str, Tensor],
        denominator: int,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        """See `Objective.loss`."""
        assert self.updates == 1 or "log_prob" in prepared, "several updates need the stored old log-probs"
        step = self._replay(model, rollout, pairs)
        at = {name: values[pairs.step, pairs.sample] for name, values in prepared.items()}
        rows = None if weights is None else weights[pairs.sample]
        factors = rows
        if self.step_weights == "noise":
            factors = self._step_weights(rollout)[pairs.step]
            factors = factors if rows is None else factors * rows
        loss, metrics = self._policy_loss(
            step,
            at,
            log_prob=step.log_prob,
            log_prob_old=at.get("log_prob", step.log_prob.detach()),
            advantages=advantages[pairs.sample].to(step.log_prob.device),
            clip_range=self.clip_range,
            weights=factors,
            denominator=denominator,
        )
        if "mean_reference" in at:
            kl = kl_to_reference(step.mean, at["mean_reference"], step.noise_rate)
            total = kl.sum() if rows is None else (kl * rows).sum()
            loss = loss + self.kl_weight * self.reference_scale * total / denominator
            metrics = metrics | {"kl": kl.detach().mean()}
        return loss, metrics

    @abstractmethod
    def _policy_loss(self, step: ReplayedStep, at: dict[str, Tensor], **common: Any) -> tuple[Tensor, Metrics]:
        """The loss without its KL term.

        Args:
            step: the pairs' steps under the weights applied now.
            at: what is prepared, at the pairs.
            **common: what every policy loss of `flow.objectives` takes.
        """


class Clipped(PolicyGradient):
    """Flow-GRPO's clipped policy gradient (arXiv 2505.05470).

    Args:
        clip_range: see `PolicyGradient`. Published: 1e-4; 1e-5 for windows of one or two steps.
        **settings: see `PolicyGradient` and `Objective`.
    """

    def __init__(self, *, clip_range: float = 1e-4, **settings: Any) -> None:
        super().__init__(clip_range=clip_range, **settings)

    def _policy_loss(self, step: ReplayedStep, at: dict[str, Tensor], **common: Any) -> tuple[Tensor, Metrics]:
        return clipped_policy_loss(**common)


class Guarded(PolicyGradient):
    """GRPO-Guard: the ratio is centred step by step (arXiv 2510.22319).

    Args:
        clip_range: see `PolicyGradient`. Published: 2e-6.
        **settings: see `PolicyGradient` and `Objective`.
    """

    def __init__(self, *, clip_range: float = 2e-6, **settings: Any) -> None:
        super().__init__(clip_range=clip_range, **settings)

    def check(self, settings: RolloutSettings, sigmas: Sequence[float]) -> None:
        """See `Objective.check`."""
        if settings.transition == "cps":
            raise ValueError(
                "The Guarded objective centres the log-ratio of a Gaussian density, which cps does not give (its "
                "published log-probability drops 1 / (2 std^2)). Set model.rollout.transition to 'flow_sde' or "
                "'dance', or model.objective to flow_rl.rl.objectives.Clipped."
            )
        super().check(settings, sigmas)

    def _policy_loss(self, step: ReplayedStep, at: dict[str, Tensor], **common: Any) -> tuple[Tensor, Metrics]:
        mean_old = at.get("mean", step.mean.detach())
        return guarded_policy_loss(**common, mean=step.mean, mean_old=mean_old, std=step.std, dt=step.dt)
