"""What a callback adds to the cost of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from flow_rl.models.workload import Drawing


@dataclass(frozen=True, kw_only=True)
class Demands:
    """What a callback draws, keeps and reads.

    Attributes:
        drawings: images that it draws with the stage's generator.
        averages: names of the averages of the trained weights that it keeps, saves, and swaps in for validation.
        missing: a sentence on each file that it needs and that is not there.
    """

    drawings: tuple[Drawing, ...] = ()
    averages: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


class Demanding(ABC):
    """A callback whose demands the doctor plans for."""

    @abstractmethod
    def demands(self) -> Demands:
        """What the callback draws, keeps and reads, by its settings."""
