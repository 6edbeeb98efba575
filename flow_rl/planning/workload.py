"""How much one iteration does: groups, samples, forwards by phase.

Shapes: G images a prompt, T denoising steps, K trained (sample, step) pairs a sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from flow_rl.models.loading import peek_grid, peek_sigmas
from flow_rl.planning.setup import Setup

#: text tokens assumed of a prompt, template included, where nothing has been tokenised
TEXT_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Forwards of one kind in an iteration, on one rank.

    Attributes:
        name: of the phase.
        evaluations: samples times denoising evaluations.
        backward: whether a backward pass follows.
    """

    name: str
    evaluations: int
    backward: bool = False


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Images drawn outside the rollouts, at most so many at a time on one rank.

    Attributes:
        name: of the occasion.
        prompts: distinct prompts among them.
        samples: images.
    """

    name: str
    prompts: int
    samples: int


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One iteration.

    Attributes:
        groups: prompts an iteration, over all ranks.
        group_size: G.
        ranks: of the run.
        updates: optimizer steps an iteration.
        pairs: (sample, step) pairs of one update, over all ranks.
        micro_batch: pairs of one backward.
        rollout_batch: images denoised at a time.
        phases: forwards on one rank.
        target: latent tokens of an image.
        source: latent tokens of a source image; 0 for text-to-image.
        drawings: images of the probe, the monitor and validation.
        kept_a_sample: latents that an iteration keeps of every sample from its rollout to its update.
        guided_teacher: whether a teacher evaluates the unconditional branch too.
        text: tokens of a prompt.
    """

    groups: int
    group_size: int
    ranks: int
    updates: int
    pairs: int
    micro_batch: int
    rollout_batch: int
    phases: tuple[Phase, ...]
    target: int
    source: int
    drawings: tuple[Drawing, ...]
    kept_a_sample: int
    guided_teacher: bool = False
    text: int = TEXT_TOKENS

    @property
    def samples_a_rank(self) -> int:
        """Images that one rank makes an iteration."""
        return math.ceil(self.groups / self.ranks) * self.group_size

    @property
    def accumulation(self) -> int:
        """Backwards that one rank adds up before an optimizer step."""
        return math.ceil(self.pairs / self.ranks / self.micro_batch)

    @property
    def prompts_a_micro_batch(self) -> int:
        """Distinct prompts that a micro-batch can touch: pairs are ordered sample by sample, prompt by prompt."""
        pairs_a_prompt = max(1, self.pairs // max(1, self.groups))
        return max(1, math.ceil(self.micro_batch / pairs_a_prompt))


def workload_of(setup: Setup) -> Workload | None:
    """The workload of a GRPO or distillation run; None for stages that the doctor does not count."""
    model, data = setup.model, setup.data
    if hasattr(model, "rollout_settings"):
        counts = _policy_counts(model, setup)
    elif hasattr(model, "distillation_settings"):
        counts = _student_counts(model, setup)
    else:
        return None
    size = (model.image_size, model.image_size)
    target = math.prod(peek_grid(model.model_path, size))
    return Workload(
        ranks=setup.ranks,
        target=target,
        source=target if edits(data) else 0,
        groups=_prompts(data),
        drawings=_drawings(setup),
        **counts,
    )


def _drawings(setup: Setup) -> tuple[Drawing, ...]:
    """What a rank draws for the callbacks and validation: its share, at most as many images at a time as a rollout."""
    settings = getattr(setup.model, "rollout_settings", None) or setup.model.distillation_settings
    parts = tasks(setup.data).values()
    batch = max((getattr(part, "eval_batch_size", 1) for part in parts), default=1)
    found = []

    def add(name: str, prompts: int, members: int) -> None:
        prompts = max(1, min(math.ceil(prompts / setup.ranks), settings.batch_size // members))
        found.append(Drawing(name=name, prompts=prompts, samples=prompts * members))

    for callback in setup.callbacks:
        if callback in setup.probes:
            add("probe", callback.prompts, 1)
        elif callback in setup.monitors:
            add("monitor", callback.prompts, callback.members)
    if setup.data is not None and setup.trainer.get("limit_val_batches") != 0:
        add("validation", batch, setup.model.val_members)
    return tuple(found)


def tasks(data: Any) -> dict[str, Any]:
    """The datamodules of each task; none of data that are no prompts."""
    return data.by_task() if hasattr(data, "by_task") else {}


def edits(data: Any) -> bool:
    """Whether any of the datamodule's prompts come with source images; all are then planned as if they did."""
    return "edit" in tasks(data)


def _prompts(data: Any) -> int:
    """Prompts of an iteration: of all tasks together, or of the larger one where an iteration is of one task."""
    counts = [part.prompts_per_step for part in tasks(data).values()]
    if counts:
        return max(counts) if hasattr(data, "task_at") else sum(counts)
    return int(getattr(data, "batch_size", None) or 1)


def _policy_counts(model: Any, setup: Setup) -> dict[str, Any]:
    rollout, objective, ranks = model.rollout_settings, model.objective, setup.ranks
    steps = objective.pairs_per_sample(rollout)
    size = (model.image_size, model.image_size)
    sigmas = peek_sigmas(model.model_path, rollout.num_steps, image_size=size)[:-1].tolist()
    guided = sum(rollout.guidance.active(sigma) for sigma in sigmas)
    samples = math.ceil(_prompts(setup.data) / ranks) * rollout.group_size
    pairs = samples * steps * objective.updates
    prepared = pairs if objective.prepares_each_update else samples * steps
    phases = [Phase(name="rollout, conditional", evaluations=samples * rollout.num_steps)]
    if guided:
        phases.append(Phase(name="rollout, unconditional", evaluations=samples * guided))
    if objective.prepares_forwards:
        phases.append(Phase(name="old policy" if objective.uses_old_policy else "replay", evaluations=prepared))
    if objective.uses_reference:
        phases.append(Phase(name="reference", evaluations=prepared))
    phases.append(Phase(name="training", evaluations=pairs * (2 if rollout.cfg == "both" else 1), backward=True))
    # The image's latents, and of each step its states or what was noised, and what other weights say there.
    others = objective.prepares_forwards + objective.uses_reference
    kept = 1 + steps * ((2 if objective.uses_window else 1) + others)
    return {
        "group_size": rollout.group_size, "updates": objective.updates, "micro_batch": objective.micro_batch_size,
        "pairs": _prompts(setup.data) * rollout.group_size * steps, "phases": tuple(phases),
        "rollout_batch": min(max(1, rollout.batch_size // rollout.group_size) * rollout.group_size, samples),
        "kept_a_sample": kept,
    }  # fmt: skip


def _student_counts(model: Any, setup: Setup) -> dict[str, Any]:
    settings, prompts = model.distillation_settings, _prompts(setup.data)
    samples, states = math.ceil(prompts / setup.ranks), settings.num_states or settings.num_steps
    guided = any(teacher.guidance.scale != 1 for teacher in model.teachers.values())
    return {
        "group_size": 1, "updates": 1, "micro_batch": settings.micro_batch_size, "pairs": prompts * states,
        "rollout_batch": min(settings.batch_size, samples),
        "guided_teacher": guided,
        "kept_a_sample": 2 * states,  # the student's states, and the teacher's velocities there
        "phases": (
            Phase(name="student's rollout", evaluations=samples * settings.num_steps),
            Phase(name="teacher", evaluations=samples * states * (2 if guided else 1)),
            Phase(name="training", evaluations=samples * states, backward=True),
        ),
    }  # fmt: skip
