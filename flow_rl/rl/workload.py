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
from flow_rl.flow.windows import steps_of_iteration
from flow_rl.models import Conditioning, ImageModel
from flow_rl.models.loading import peek_grid, peek_sigmas
from flow_rl.models.workload import Options, Phase, Workload
from flow_rl.rl.objectives import OBJECTIVES, Objective, Rollout, micro_batches
from flow_rl.rl.settings import ObjectiveSettings, RolloutSettings


def policy_workload(
    *,
    model_path: str,
    image_size: int,
    rollout: RolloutSettings,
    objective: ObjectiveSettings,
    adapter: bool,
    data: PromptData | None,
    ranks: int,
) -> Workload:
    """Count what one iteration of a policy asks of the generator.

    Args:
        model_path: of the generator; only its configs are read.
        image_size: height and width in pixels.
        rollout: how images are made.
        objective: what an update minimises.
        adapter: whether an adapter is trained: the reference is then the model without it, and no copy.
        data: the prompts; None counts one prompt an iteration.
        ranks: processes that share the prompts.
    """
    made = OBJECTIVES[objective.kind](rollout, objective)
    groups, size = 1 if data is None else data.prompts_per_iteration, (image_size, image_size)
    samples = math.ceil(groups / ranks) * rollout.group_size
    target = math.prod(peek_grid(model_path, size))
    steps = _trained_steps(made, rollout, objective)
    replays = made.uses_window and objective.updates > 1
    # The image's latents, and of each step its states or what was noised, and what other weights say there.
    kept = 1 + steps * ((2 if made.uses_window else 1) + made.uses_old_policy + made.uses_reference + replays)
    return Workload(
        groups=groups,
        group_size=rollout.group_size,
        ranks=ranks,
        updates=objective.updates,
        pairs=groups * rollout.group_size * steps,
        micro_batch=objective.micro_batch_size,
        rollout_batch=min(max(1, rollout.batch_size // rollout.group_size) * rollout.group_size, samples),
        batch_size=rollout.batch_size,
        phases=tuple(_phases(made, rollout, objective, samples, steps, _guided_steps(model_path, size, rollout))),
        target=target,
        source=target if data is not None and data.edits else 0,
        kept_a_sample=kept,
        loss=PolicyLoss(model_path=model_path, image_size=image_size, rollout=rollout, objective=objective),
        options=Options(micro_batch="model.objective.micro_batch_size", rollout_batch="model.rollout.batch_size"),
        copies=("old policy",) * made.uses_old_policy + ("reference",) * (made.uses_reference and not adapter),
        guided_update=rollout.cfg == "both",
        guided_drawings=rollout.guidance.scale != 1,
    )


def _trained_steps(made: Objective, rollout: RolloutSettings, objective: ObjectiveSettings) -> int:
    """Pairs of each sample in an update."""
    if made.uses_window:
        return len(steps_of_iteration(rollout.window, rollout.num_steps, iteration=0, seed=0))
    return objective.nft_steps


def _guided_steps(model_path: str, size: tuple[int, int], rollout: RolloutSettings) -> int:
    sigmas = peek_sigmas(model_path, rollout.num_steps, image_size=size)[:-1].tolist()
    return sum(rollout.guidance.active(sigma) for sigma in sigmas)


def _phases(
    made: Objective, rollout: RolloutSettings, objective: ObjectiveSettings, samples: int, steps: int, guided: int
) -> Iterator[Phase]:
    """Forwards of one rank: `samples` of its own, `steps` trained steps each, `guided` of the T steps guided."""
    pairs = samples * steps * objective.updates
    yield Phase(name="rollout, conditional", evaluations=samples * rollout.num_steps)
    if guided:
        yield Phase(name="rollout, unconditional", evaluations=samples * guided)
    if made.uses_old_policy:
        yield Phase(name="old policy", evaluations=pairs)
    elif made.uses_window and objective.updates > 1:
        yield Phase(name="replay", evaluations=samples * steps)
    if made.uses_reference:
        yield Phase(name="reference", evaluations=samples * steps if made.uses_window else pairs)
    yield Phase(name="training", evaluations=pairs * (2 if rollout.cfg == "both" else 1), backward=True)


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """The loss of a micro-batch by the run's own objective, from a rollout on the meta device that holds no values.

    Attributes:
        model_path: of the generator.
        image_size: height and width in pixels.
        rollout: how images are made.
        objective: what an update minimises.
    """

    model_path: str
    image_size: int
    rollout: RolloutSettings
    objective: ObjectiveSettings

    def __call__(
        self, model: ImageModel, conditional: Conditioning, unconditional: Conditioning | None
    ) -> Callable[[], Tensor]:
        """Prepare one trained step of every sample, and return the function that computes the loss."""
        objective = OBJECTIVES[self.objective.kind](self.rollout, self.objective)
        samples, size = len(conditional), (self.image_size, self.image_size)
        rollout = self._rollout(model, conditional, unconditional, size)
        prepared = objective.prepare(model, rollout, 0)
        if objective.uses_reference:
            prepared |= objective.prepare_reference(model, rollout, prepared)
        pairs = next(micro_batches(samples, 1, samples))
        return lambda: objective.loss(model, rollout, torch.zeros(samples), pairs, prepared, denominator=samples)[0]

    def _rollout(
        self, model: ImageModel, conditional: Conditioning, unconditional: Conditioning | None, size: tuple[int, int]
    ) -> Rollout:
        samples, prompts, shape = len(conditional), len(conditional.embeds), model.latent_shape(*size)
        latents, states, next_states = (
            torch.empty(*leading, samples, *shape, device="meta") for leading in ((), (1,), (1,))
        )
        return Rollout(
            prompts=Prompts(ids=tuple(range(prompts)), texts=("",) * prompts, categories=("",) * prompts),
            trajectory=Trajectory(latents=latents, steps=(0,), states=states, next_states=next_states),
            sigmas=peek_sigmas(self.model_path, self.rollout.num_steps, image_size=size),
            conditioning=conditional,
            unconditional=unconditional,
            members=tuple(range(samples)),
            iteration=0,
            seed=0,
        )
