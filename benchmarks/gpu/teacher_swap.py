"""Teachers that are brought in on a stream of their own, while the student learns, have the right weights.

Two faults are possible: a teacher may answer before its weights have arrived, or weights may arrive before the former
teacher has answered. Training would show neither.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.demo_stages import teacher
from benchmarks.gpu.machine import tf32
from benchmarks.gpu.parity import BASE, PROMPTS, SIGMA, SIZE, base
from flow_rl.distillation.settings import TeacherSettings
from flow_rl.distillation.teachers import TeacherBank
from flow_rl.flow.guidance import Guidance
from flow_rl.models import load_image_model

TASKS = ("t2i", "edit")


def teacher_swap(bench: Bench) -> Iterator[Row]:
    """Two teachers in turn, each prefetched during the student's backward, against models of their own."""
    rounds = 2 if bench.tiny else 20
    paths = {task: teacher(bench.directory, seed) for seed, task in enumerate(TASKS, start=1)}
    student = base(bench.device)
    settings = {task: TeacherSettings(path=path, guidance=Guidance(scale=1.0)) for task, path in paths.items()}
    bank = TeacherBank(student, settings, model_path=BASE, dtype=torch.float32, offload=True)
    with torch.no_grad():
        conditioning = student.encode(PROMPTS).repeat_interleave(2)
    latents = torch.randn(len(conditioning), *student.latent_shape(*SIZE), device=bench.device)
    sigma = torch.full((len(conditioning),), SIGMA, device=bench.device)

    def evaluate(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model.velocity(latents, sigma, conditioning)

    with tf32(False):
        expected = {task: evaluate(load_image_model(paths[task], image_size=SIZE).to(bench.device)) for task in TASKS}
        wrong = dict.fromkeys(TASKS, 0.0)
        for number in range(rounds):
            task = TASKS[number % 2]
            found = bank.velocity(task, latents, sigma, conditioning, None)
            bank.prefetch(TASKS[1 - number % 2])  # nothing waits: the answer above may still be under way
            student.velocity(latents, sigma, conditioning).square().mean().backward()
            student.transformer.zero_grad(set_to_none=True)
            wrong[task] = max(wrong[task], float((found - expected[task]).abs().max()))
        apart = float((expected["t2i"] - expected["edit"]).abs().max())
    for task in TASKS:
        yield Row(
            name=f"teacher of {task}",
            values={"off_by": wrong[task], "teachers_apart": apart, "swaps": bank.slot.moves},
            limits={"off_by": 0.0},
        )
