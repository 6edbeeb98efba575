"""What one iteration of distillation asks of the generator, by its settings.

Shapes: M samples of a micro-batch, S latent tokens, C latent channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from flow_rl.batches import PromptData
from flow_rl.distillation.settings import DistillationSettings, TeacherSettings
from flow_rl.flow.objectives import velocity_matching_loss
from flow_rl.models import Conditioning, ImageModel
from flow_rl.models.workload import Generator, Options, Phase, Teachers, Workload


def student_workload(
    generator: Generator,
    settings: DistillationSettings,
    teachers: Mapping[str, TeacherSettings],
    data: PromptData | None,
    *,
    start_path: str,
    shard_teachers: bool,
    val_guidances: Sequence[float],
    ranks: int,
) -> Workload:
    """Count what one iteration of a student asks of the generator.

    Args:
        generator: only its configs are read. With an adapter the student's own transformer plays those teachers whose
            weights it starts from.
        settings: how the student learns.
        teachers: by task.
        data: the prompts; None counts one prompt an iteration.
        start_path: where the student starts.
        shard_teachers: whether teachers are divided over the ranks as the student is.
        val_guidances: scales of the guidance in validation.
        ranks: processes that share the prompts.
    """
    prompts, adapter = 1 if data is None else data.prompts_per_iteration, generator.lora is not None
    samples, states = math.ceil(prompts / ranks), settings.num_states or settings.num_steps
    guided = any(teacher.guidance.scale != 1 for teacher in teachers.values())
    paths = {teacher.path or generator.model_path for teacher in teachers.values()} - (
        {start_path} if adapter else set()
    )
    return Workload(
        groups=prompts,
        group_size=1,
        ranks=ranks,
        updates=1,
        pairs=prompts * states,
        micro_batch=settings.micro_batch_size,
        rollout_batch=min(settings.batch_size, samples),
        batch_size=settings.batch_size,
        phases=(
            Phase(name="student's rollout", evaluations=samples * settings.num_steps),
            Phase(name="teacher", evaluations=samples * states * (2 if guided else 1)),
            Phase(name="training", evaluations=samples * states, backward=True),
        ),
        target=generator.tokens,
        source=generator.tokens if data is not None and data.edits else 0,
        kept_a_sample=2 * states,  # the student's states, and the teacher's velocities there
        loss=student_loss,
        options=Options(
            micro_batch="model.distillation.micro_batch_size", rollout_batch="model.distillation.batch_size"
        ),
        teachers=Teachers(copies=len(paths), sharded=shard_teachers, guided=guided) if teachers else None,
        guided_drawings=any(scale != 1 for scale in val_guidances),
        decodes=False,
        encodes_all=True,
    )


def student_loss(
    model: ImageModel, conditional: Conditioning, unconditional: Conditioning | None
) -> Callable[[], Tensor]:
    """The loss of a micro-batch of states on the meta device, which hold no values."""
    samples = len(conditional)
    shape = (samples, *model.latent_shape(*model.image_size))
    states, targets, ones = (torch.empty(s, device="meta") for s in (shape, shape, (samples,)))

    def loss() -> Tensor:
        velocity = model.velocity(states, ones, conditional)
        return velocity_matching_loss(velocity, targets, weights=ones, denominator=samples)[0]

    return loss
