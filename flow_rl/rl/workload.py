"""What one GRPO iteration asks of the generator, by its settings.

Shapes: G images a prompt, T denoising steps, M samples of a micro-batch, S latent tokens, C latent channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flow_rl.batches import PromptData, Prompts
from flow_rl.flow.rollout import Trajectory
from flow_rl.models import Conditioning, ImageModel
from flow_rl.models.loading import peek_sigmas
from flow_rl.models.workload import Generator, Options, Phase, Workload
from flow_rl.rl.objectives import Objective, Rollout, micro_batches
from flow_rl.rl.settings import RolloutSettings


def policy_workload(
    generator: Generator, rollout: RolloutSettings, objective: Objective, data: PromptData | None, *, ranks: int
) -> Workload:
    """Count what one iteration of a policy asks of the generator.

    Args:
        generator: only its configs are read. With an adapter the reference is the model without it, and no copy.
        rollout: how images are made.
        objective: what an update minimises.
        data: the prompts; None counts one prompt an iteration.
        ranks: processes that share the prompts.
    """
    groups = 1 if data is None else data.prompts_per_iteration
    samples, steps = math.ceil(groups / ranks) * rollout.group_size, objective.pairs_per_sample(rollout)
    adapter = generator.lora is not None
    # The image's latents, and of each step its states or what was noised, and what other weights say there.
    others = objective.prepares_forwards + objective.uses_reference
    return Workload(
        groups=groups,
        group_size=rollout.group_size,
        ranks=ranks,
        updates=objective.updates,
        pairs=groups * rollout.group_size * steps,
        micro_batch=objective.micro_batch_size,
        rollout_batch=min(max(1, rollout.batch_size // rollout.group_size) * rollout.group_size, samples),
        batch_size=rollout.batch_size,
        phases=tuple(_phases(rollout, objective, samples, _guided_steps(generator, rollout))),
        target=generator.tokens,
        source=generator.tokens if data is not None and data.edits else 0,
        kept_a_sample=1 + steps * ((2 if objective.samples_stochastically else 1) + others),
        loss=PolicyLoss(generator=generator, settings=rollout, objective=objective),
        options=Options(micro_batch="model.objective.micro_batch_size", rollout_batch="model.rollout.batch_size"),
        copies=("old policy",) * objective.uses_old_policy
        + ("reference",) * (objective.uses_reference and not adapter),
        guided_update=rollout.cfg == "both",
        guided_drawings=rollout.guidance.scale != 1,
    )


def _guided_steps(generator: Generator, rollout: RolloutSettings) -> int:
    sigmas = peek_sigmas(generator.model_path, rollout.num_steps, image_size=generator.size)[:-1].tolist()
    return sum(rollout.guidance.active(sigma) for sigma in sigmas)


def _phases(rollout: RolloutSettings, objective: Objective, samples: int, guided: int) -> Iterator[Phase]:
    """Forwards of one rank: `samples` of its own, `guided` of the T steps guided."""
    once = samples * objective.pairs_per_sample(rollout)
    prepared = once * (objective.updates if objective.prepares_each_update else 1)
    yield Phase(name="rollout, conditional", evaluations=samples * rollout.num_steps)
    if guided:
        yield Phase(name="rollout, unconditional", evaluations=samples * guided)
    if objective.prepares_forwards:
        yield Phase(name="old policy" if objective.uses_old_policy else "replay", evaluations=prepared)
    if objective.uses_reference:
        yield Phase(name="reference", evaluations=prepared)
    branches = 2 if rollout.cfg == "both" else 1
    yield Phase(name="training", evaluations=once * objective.updates * branches, backward=True)


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """The loss of a micro-batch by the run's own objective, from a rollout on the meta device that holds no values.

    Attributes:
        generator: whose configs are read.
        settings: how images are made.
        objective: what an update minimises.
    """

    generator: Generator
    settings: RolloutSettings
    objective: Objective

    def __call__(
        self, model: ImageModel, conditional: Conditioning, unconditional: Conditioning | None
    ) -> Callable[[], Tensor]:
        """Prepare one trained step of every sample, and return the function that computes the loss."""
        objective, samples = self.objective, len(conditional)
        rollout = self._rollout(model, conditional, unconditional)
        prepared = objective.prepare(model, rollout, 0)
        if objective.uses_reference:
            prepared |= objective.prepare_reference(model, rollout, prepared)
        pairs = next(micro_batches(samples, 1, samples))
        return lambda: objective.loss(model, rollout, torch.zeros(samples), pairs, prepared, denominator=samples)[0]

    def _rollout(self, model: ImageModel, conditional: Conditioning, unconditional: Conditioning | None) -> Rollout:
        samples, prompts, size = len(conditional), len(conditional.embeds), self.generator.size
        shape = model.latent_shape(*size)
        latents, states, next_states = (
            torch.empty(*leading, samples, *shape, device="meta") for leading in ((), (1,), (1,))
        )
        return Rollout(
            settings=self.settings,
            prompts=Prompts(ids=tuple(range(prompts)), texts=("",) * prompts, categories=("",) * prompts),
            images=torch.empty(samples, 3, *size, device="meta"),
            trajectory=Trajectory(latents=latents, steps=(0,), states=states, next_states=next_states),
            sigmas=peek_sigmas(self.generator.model_path, self.settings.num_steps, image_size=size),
            conditioning=conditional,
            unconditional=unconditional,
            members=tuple(range(samples)),
            iteration=0,
            seed=0,
        )
