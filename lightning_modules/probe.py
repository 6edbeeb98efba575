"""Does an update point uphill where it counts: at the rollout's own guidance?

Under guidance the objective sees another velocity than the sampler, and a policy gradient's credit can turn round
without any sign of it in the loss. So: the reward of fixed prompts and noises at theta and a small step along the
negative gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from datamodules.batches import Prompts
from lightning_modules.grpo_policy import GRPOPolicy
from rewards.composite import weighted_mean


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Mean weighted reward of the probe's images, on 1..5.

    Attributes:
        before: at theta.
        after: at theta minus `step_size` times the gradient's direction.
    """

    before: float
    after: float

    @property
    def rise(self) -> float:
        """Points gained along the update; above 0 is uphill."""
        return self.after - self.before


def probe_update(module: GRPOPolicy, training: Prompts, held_out: Prompts, *, step_size: float) -> Probe:
    """Roll out, take the gradient of the first update, and look which way it goes. Weights are left as they were.

    Args:
        module: with its model configured.
        training: prompts of the update.
        held_out: prompts whose reward is compared, each drawn once from its fixed noise.
        step_size: length of the step in weight space (Euclidean norm).
    """
    trainable = [p for p in module.model.transformer.parameters() if p.requires_grad]
    module.model.transformer.train()
    rollout, images = module._roll_out(training)
    advantages = module.score(training, images).advantages
    module.zero_grad()
    module.accumulate_gradients(rollout, advantages, module._prepare(rollout, 0))
    norm = torch.sqrt(sum((p.grad.square().sum() for p in trainable if p.grad is not None), torch.zeros(())))
    before = _reward(module, held_out)
    kept = [p.detach().clone() for p in trainable]
    with torch.no_grad():
        for parameter in trainable:
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=float(step_size / norm))
    after = _reward(module, held_out)
    with torch.no_grad():
        for parameter, value in zip(trainable, kept, strict=True):
            parameter.copy_(value)
    module.zero_grad()
    return Probe(before=before, after=after)


def _reward(module: GRPOPolicy, prompts: Prompts) -> float:
    scores: dict[str, Tensor] = dict(module.draw(prompts, module.rewards, 1).scores)
    weights = module.weight_source.weights(prompts.categories, [prompts.task] * len(prompts), list(scores))
    return float(weighted_mean(torch.stack(list(scores.values()), dim=1), weights).nanmean())
