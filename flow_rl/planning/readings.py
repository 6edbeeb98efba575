"""What the bench reads of a run: every moment that depends on its sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from flow_rl.planning import bench
from flow_rl.planning.bench import Case, Denoising, Precision, Update
from flow_rl.planning.losses import loss_of, needs_unconditional
from flow_rl.planning.meter import Reading
from flow_rl.planning.setup import Setup
from flow_rl.planning.weights import Components
from flow_rl.planning.workload import Drawing, Workload


@dataclass(frozen=True, kw_only=True)
class Readings:
    """Readings of a run's moments.

    Attributes:
        text: prompts to embeddings, as many as are encoded at a time.
        sources: source images to latents; None for text-to-image.
        rollout: prefix and evaluation of the rollout's batch.
        decode: latents of the rollout's batch to images.
        update: a micro-batch.
        teacher: prefix and evaluation of a micro-batch by a teacher; None without teachers.
        drawings: the same as for the rollout, by occasion.
    """

    text: Reading
    sources: Reading | None
    rollout: Denoising
    decode: Reading
    update: Update
    teacher: Denoising | None
    drawings: dict[str, tuple[Denoising, Reading]]


def read(setup: Setup, parts: Components, work: Workload) -> Readings:
    """Run every moment of a plan on the meta device."""
    module = setup.model
    guided = any("unconditional" in phase.name for phase in work.phases)
    taught = bool(getattr(module, "teachers", None))
    rollout, micro = rollout_case(setup, work), micro_case(setup, work)
    # Distillation encodes all prompts of an iteration at a time; a policy those of a rollout's batch.
    prompts = max(1, math.ceil(work.groups / work.ranks)) if taught else rollout.prompts
    encoded = replace(rollout, prompts=prompts, samples=prompts)
    return Readings(
        text=bench.encode_text(parts, encoded),
        sources=bench.encode_sources(parts, encoded) if work.source else None,
        rollout=bench.denoising(parts, rollout, guided),
        decode=_decoded(parts, rollout),
        update=bench.update(
            parts, micro, loss_of(module), guided=needs_unconditional(module), checkpointing=setup.checkpointing
        ),
        teacher=bench.denoising(parts, micro, guided=work.guided_teacher) if taught else None,
        drawings={drawing.name: _drawn(setup, parts, work, drawing) for drawing in work.drawings},
    )


def _drawn(setup: Setup, parts: Components, work: Workload, drawing: Drawing) -> tuple[Denoising, Reading]:
    case = replace(rollout_case(setup, work), samples=drawing.samples, prompts=drawing.prompts)
    guidance = getattr(getattr(setup.model, "rollout_settings", None), "guidance", None)
    scales = [guidance.scale] if guidance else getattr(setup.model, "val_guidances", [1.0])
    return bench.denoising(parts, case, any(scale != 1 for scale in scales)), _decoded(parts, case)


def _decoded(parts: Components, case: Case) -> Reading:
    return bench.decode(parts, replace(case, prompts=1, text=0, edit=False))


def rollout_case(setup: Setup, work: Workload) -> Case:
    """What a rollout denoises at a time."""
    samples = work.rollout_batch
    return _case(setup, work, samples, max(1, samples // work.group_size))


def micro_case(setup: Setup, work: Workload) -> Case:
    """What one backward sees."""
    samples = min(work.micro_batch, math.ceil(work.pairs / work.ranks))
    return _case(setup, work, samples, min(samples, work.prompts_a_micro_batch))


def _case(setup: Setup, work: Workload, samples: int, prompts: int) -> Case:
    module: Any = setup.model
    gathered = setup.gathered_dtype
    return Case(
        path=module.model_path,
        precision=Precision(
            trained=gathered or torch.float32,
            frozen=gathered or setup.dtypes.transformer,
            text=setup.dtypes.text_encoder,
        ),
        size=module.image_size,
        samples=samples,
        prompts=prompts,
        text=work.text,
        edit=bool(work.source),
        sharded=setup.shards > 1,
    )
