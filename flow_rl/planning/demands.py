"""What a callback adds to the cost of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flow_rl.models.workload import Drawing


@dataclass(frozen=True, kw_only=True)
class Average:
    """An average of the trained weights.

    Attributes:
        name: for plans.
        share_of_start: from the iterations of a run and the optimizer steps of each, the share in [0, 1] that the
            weights from before training have in the average at its end.
        advice: how to make that share smaller.
    """

    name: str
    share_of_start: Callable[[int, int], float]
    advice: str


@dataclass(frozen=True, kw_only=True)
class Demands:
    """What a callback draws, keeps and reads.

    Attributes:
        drawings: images that it draws with the stage's generator.
        averages: of the trained weights, which it keeps, saves, and swaps in for validation.
        missing: a sentence on each file that it needs and that is not there.
        replaces: folders that it writes anew, whole.
    """

    drawings: tuple[Drawing, ...] = ()
    averages: tuple[Average, ...] = ()
    missing: tuple[str, ...] = ()
    replaces: tuple[Path, ...] = ()


class Demanding(ABC):
    """A callback whose demands the doctor plans for."""

    @abstractmethod
    def demands(self) -> Demands:
        """What the callback draws, keeps and reads, by its settings."""
