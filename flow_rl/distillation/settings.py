"""What a distillation can be told, and what it refuses to be told."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from flow_rl.batches import TASKS
from flow_rl.flow.guidance import Guidance
from flow_rl.flow.states import choose_states, kl_weights
from flow_rl.models.adapters import check_adapter
from flow_rl.models.compatibility import check_same_generator
from flow_rl.models.loading import config_directory
from flow_rl.models.native import native_sampling
from flow_rl.suggestions import nearest

#: value of `initial` that starts the student from `model_path`
BASE = "base"


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """One teacher: the velocity that the student learns on one task."""

    guidance: Guidance
    """Classifier-free guidance of the teacher's velocity: scale, interval of sigma, rescaling. The student learns the
    guided velocity, and is then sampled at guidance 1."""
    path: str | None = None
    """Directory in the diffusers layout; null is the student's `model_path`. With an adapter: what it adapts."""
    adapter: str | None = None
    """Directory or .safetensors file of a LoRA over `path`, as callbacks.ExportAdapter, diffusers, PEFT, kohya or
    ComfyUI write it; null for none."""

    def __post_init__(self) -> None:
        if self.guidance.scale < 1:
            raise ValueError(
                f"A teacher's guidance scale is {self.guidance.scale}; it must be at least 1 (1 is no guidance). Below "
                "1 the student would learn to pay less attention to the prompt."
            )


@dataclass(frozen=True, kw_only=True)
class DistillationSettings:
    """How the student learns from its own trajectories."""

    num_steps: int = 40
    """N, steps of the student's ODE rollout, which makes N states."""
    num_states: int | None = None
    """K, states of each rollout that are trained, drawn anew each iteration; null takes all N."""
    state_bias: float = 0.0
    """With K < N: a state at noise level sigma is drawn with probability proportional to sigma ** state_bias. Above 0
    favours high noise, below 0 low noise."""
    loss: Literal["velocity", "kl"] = "velocity"
    """velocity: mean squared difference of the velocities; kl: the same, each state weighted so that it is the KL
    divergence of the stochastic steps that the two velocities would take there."""
    kl_transition: Literal["flow_sde", "dance"] = "flow_sde"
    """kl: the kind of those steps."""
    kl_noise_level: float = 0.7
    """kl: their noise level; eta for dance."""
    state_weights: tuple[float, ...] | None = None
    """Factor on the loss of each of the N states, from noise to data; null is 1 for all."""
    batch_size: int = 128
    """Images denoised at a time in the student's rollout; bounds memory, changes nothing else."""
    micro_batch_size: int = 32
    """States a backward; bounds memory, changes nothing else. 1 goes state by state."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.distillation.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.num_states is not None and not 1 <= self.num_states <= self.num_steps:
            raise ValueError(
                f"model.distillation.num_states is {self.num_states}; a rollout of num_steps {self.num_steps} has 1 to "
                f"{self.num_steps} states. Lower num_states, or set it to null for all."
            )
        if self.state_bias != 0 and self.num_states in (None, self.num_steps):
            raise ValueError(
                f"model.distillation.state_bias is {self.state_bias}, but all {self.num_steps} states are trained, so "
                "nothing is drawn: the bias would be ignored. Set num_states below num_steps, or use state_weights."
            )
        if self.loss == "kl" and not self.kl_noise_level > 0:
            raise ValueError(
                f"model.distillation.kl_noise_level is {self.kl_noise_level}; without noise the KL divergence of two "
                "velocities is infinite. Set it above 0."
            )
        _check_weights(self.state_weights, self.num_steps)

    def weights(self, sigmas: Tensor) -> Tensor:
        """Factor on the squared velocity error of each state, float32 (N,), for a schedule (N + 1,)."""
        weights = torch.ones(len(sigmas) - 1)
        if self.loss == "kl":
            weights = kl_weights(sigmas, kind=self.kl_transition, noise_level=self.kl_noise_level)
        return weights if self.state_weights is None else weights * torch.tensor(self.state_weights)

    def states(self, sigmas: Tensor, generator: torch.Generator) -> tuple[int, ...]:
        """The states trained in one iteration, ascending; all samples share them."""
        return choose_states(sigmas, self.num_states, bias=self.state_bias, generator=generator)


def _check_weights(weights: Sequence[float] | None, num_steps: int) -> None:
    if weights is None:
        return
    if len(weights) != num_steps:
        raise ValueError(
            f"model.distillation.state_weights has {len(weights)} entries; the rollout has {num_steps} states, from "
            "noise to data, and each needs one."
        )
    if not all(0 <= weight < float("inf") for weight in weights) or sum(weights) == 0:
        raise ValueError(
            f"model.distillation.state_weights must be non-negative and not all 0; received {list(weights)}."
        )


def student_path(model_path: str, initial: str, teachers: Mapping[str, TeacherSettings]) -> str:
    """Directory of the weights that the student starts from.

    Raises:
        ValueError: no teachers; an `initial` that is neither 'base' nor a teacher with all its weights on disk.
    """
    if not teachers:
        raise ValueError("model.teachers is empty: name at least one teacher by its task, such as t2i.")
    if initial == BASE:
        return model_path
    if initial not in teachers:
        hint = nearest(initial, [BASE, *teachers])
        raise ValueError(f"model.initial is '{initial}'; expected '{BASE}' or one of {', '.join(teachers)}.{hint}")
    if teachers[initial].adapter is not None:
        raise ValueError(
            f"model.initial is '{initial}', whose teacher is an adapter: a student starts from full weights. "
            "Export that teacher with callbacks.ExportModel and point model_path at the result."
        )
    return teachers[initial].path or model_path


def check_teachers(
    teachers: Mapping[str, TeacherSettings],
    *,
    model_path: str,
    start_path: str,
    num_steps: int,
    image_size: tuple[int, int],
) -> None:
    """Refuse teachers that the student can't learn from, before a model loads.

    Args:
        teachers: by task.
        model_path: the base.
        start_path: where the student starts; see `student_path`.
        num_steps: N of the student's rollout.
        image_size: height and width in pixels.

    Raises:
        ValueError: a teacher of no known task, one that is missing, of another architecture, latent shape or schedule,
            or teachers that all are the student itself.
    """
    for task, teacher in teachers.items():
        if task not in TASKS:
            raise ValueError(
                f"model.teachers.{task}: no batch is of a task '{task}', so this teacher would never be asked. The "
                f"tasks are {' and '.join(TASKS)}.{nearest(task, TASKS)}"
            )
        name, path = f"model.teachers.{task}", teacher.path or model_path
        if Path(path).resolve() != Path(model_path).resolve():
            check_same_generator(path, model_path, name=name, num_steps=num_steps, image_size=image_size)
        if teacher.adapter is not None:
            try:
                check_adapter(teacher.adapter, config_directory(path) / "transformer")
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    if all(_is_student(teacher, model_path, start_path) for teacher in teachers.values()):
        raise ValueError(
            f"Every teacher is the student's own start '{start_path}' at guidance 1: the loss would be 0 and nothing "
            "learnt. Point model.teachers at trained models, or give a guidance scale above 1."
        )


def _is_student(teacher: TeacherSettings, model_path: str, start_path: str) -> bool:
    same = Path(teacher.path or model_path).resolve() == Path(start_path).resolve()
    return same and teacher.adapter is None and teacher.guidance.scale == 1


def check_tasks(teachers: Mapping[str, TeacherSettings], tasks: Sequence[str]) -> list[str]:
    """Refuse data of a task that nobody teaches.

    Args:
        teachers: by task.
        tasks: that the training data are of.

    Returns:
        Teachers that no data will ask, which is worth a warning.

    Raises:
        ValueError: naming the tasks without a teacher.
    """
    untaught = [task for task in tasks if task not in teachers]
    if untaught:
        raise ValueError(
            f"The data have batches of the task {', '.join(repr(t) for t in untaught)}, but model.teachers has "
            f"{', '.join(teachers)} only. Add a teacher, or set the task's ratio to 0."
        )
    return [task for task in teachers if task not in tasks]


def warn_of_teachers(teachers: Mapping[str, TeacherSettings], model_path: str, tasks: Sequence[str] | None) -> None:
    """Warn of teachers that are never asked, and of teachers none of which is guided where the base is meant to be.

    Args:
        teachers: by task.
        model_path: the base.
        tasks: that the training data are of; None where they do not say.

    Raises:
        ValueError: see `check_tasks`.
    """
    for idle in [] if tasks is None else check_tasks(teachers, tasks):
        warnings.warn(f"The teacher of '{idle}' is never asked: no training data are of its task.", stacklevel=2)
    native = native_sampling(model_path)
    guided = native is None or native.guidance != 1
    if guided and all(teacher.guidance.scale == 1 for teacher in teachers.values()):
        warnings.warn("No teacher is guided: the student learns no guidance with them.", stacklevel=2)


def check_scored(
    scored: Mapping[str, Sequence[str]] | None, rewards: Sequence[str]
) -> dict[str, tuple[str, ...]] | None:
    """Which rewards are asked about each task's samples; None asks all.

    Raises:
        ValueError: an unknown task or reward.
    """
    if scored is None:
        return None
    for task, names in scored.items():
        for name, known, what in [(task, TASKS, "tasks"), *((name, rewards, "rewards") for name in names)]:
            if name not in known:
                raise ValueError(
                    f"model.scored names '{name}'; the {what} are {', '.join(known)}.{nearest(name, known)}"
                )
    return {task: tuple(names) for task, names in scored.items()}
