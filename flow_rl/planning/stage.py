"""What a stage says of itself before it has weights: all that the doctor knows of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from flow_rl.batches import PromptData
from flow_rl.distillation.settings import TeacherSettings
from flow_rl.flow.guidance import Guidance
from flow_rl.models.workload import Generator, Workload
from flow_rl.rewards import Reward


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What the doctor checks of a stage.

    Attributes:
        manual: whether the stage steps its optimizer itself, and so adds up micro-batches by itself.
        make_optimizer: makes the optimizer from a list of parameters; None for a stage of unknown kind.
        updates: optimizer steps an iteration.
        generator: the image generator; None for a stage without one.
        num_steps: denoising steps, by setting.
        guidances: guidance in training, by the setting of its scale.
        drawn_guidances: guidance of `validate`, `test` and `predict`, by the setting of its scale.
        teachers: by task.
        rewards: scorers by name.
        monitors: scorers that are watched alone, by name.
        trained_on: names of the rewards with a weight above 0, by task.
    """

    manual: bool
    make_optimizer: Any = None
    updates: int = 1
    generator: Generator | None = None
    num_steps: Mapping[str, int] = field(default_factory=dict)
    guidances: Mapping[str, Guidance] = field(default_factory=dict)
    drawn_guidances: Mapping[str, Guidance] = field(default_factory=dict)
    teachers: Mapping[str, TeacherSettings] = field(default_factory=dict)
    rewards: Mapping[str, Reward] = field(default_factory=dict)
    monitors: Mapping[str, Reward] = field(default_factory=dict)
    trained_on: Mapping[str, Collection[str]] = field(default_factory=dict)


class Stage(Protocol):
    """What can be planned."""

    def profile(self) -> Profile:
        """Settings that the doctor checks."""

    def workload(self, data: PromptData | None, *, ranks: int) -> Workload | None:
        """What one iteration asks of the generator; None for a stage whose work is not counted.

        Args:
            data: the prompts; None where the data are no prompts.
            ranks: processes that share them.
        """
