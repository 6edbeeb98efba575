"""What the bench reads of a run: every moment that depends on its sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from flow_rl.models.workload import Drawing, Workload
from flow_rl.planning import bench
from flow_rl.planning.bench import Case, Denoising, Precision, Update
from flow_rl.planning.meter import Reading
from flow_rl.planning.setup import Setup
from flow_rl.planning.weights import Components


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
        drawings: the same as for the rollout, of each drawing.
    """

    text: Reading
    sources: Reading | None
    rollout: Denoising
    decode: Reading
    update: Update
    teacher: Denoising | None
    drawings: Mapping[Drawing, tuple[Denoising, Reading]]


def read(setup: Setup, parts: Components, work: Workload) -> Readings:
    """Run every moment of a plan on the meta device."""
    guided = any("unconditional" in phase.name for phase in work.phases)
    rollout, micro, teachers = rollout_case(setup, work), micro_case(setup, work), work.teachers
    prompts = max(1, work.prompts_a_rank) if work.encodes_all else rollout.prompts
    encoded = replace(rollout, prompts=prompts, samples=prompts)
    return Readings(
        text=bench.encode_text(parts, encoded),
        sources=bench.encode_sources(parts, encoded) if work.source else None,
        rollout=bench.denoising(parts, rollout, guided),
        decode=_decoded(parts, rollout),
        update=bench.update(parts, micro, work.loss, guided=work.guided_update, checkpointing=setup.checkpointing),
        teacher=None if teachers is None else bench.denoising(parts, micro, guided=teachers.guided),
        drawings={drawing: _drawn(setup, parts, work, drawing) for drawing in work.drawings},
    )


def _drawn(setup: Setup, parts: Components, work: Workload, drawing: Drawing) -> tuple[Denoising, Reading]:
    prompts = work.prompts_of(drawing)
    case = replace(rollout_case(setup, work), samples=prompts * drawing.members, prompts=prompts)
    return bench.denoising(parts, case, work.guided_drawings), _decoded(parts, case)


def _decoded(parts: Components, case: Case) -> Reading:
    return bench.decode(parts, replace(case, prompts=1, text=0, edit=False))


def rollout_case(setup: Setup, work: Workload) -> Case:
    """What a rollout denoises at a time."""
    return _case(setup, work, work.rollout_batch, work.prompts_a_rollout)


def micro_case(setup: Setup, work: Workload) -> Case:
    """What one backward sees."""
    samples = min(work.micro_batch, math.ceil(work.pairs / work.ranks))
    return _case(setup, work, samples, min(samples, work.prompts_a_micro_batch))


def _case(setup: Setup, work: Workload, samples: int, prompts: int) -> Case:
    generator, gathered = setup.generator, setup.gathered_dtype
    return Case(
        path=generator.model_path,
        precision=Precision(
            trained=gathered or torch.float32,
            frozen=gathered or generator.dtypes.transformer,
            text=generator.dtypes.text_encoder,
        ),
        size=generator.image_size,
        samples=samples,
        prompts=prompts,
        text=work.text,
        edit=bool(work.source),
        sharded=setup.shards > 1,
    )
