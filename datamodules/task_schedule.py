"""Which task the n-th batch of training is of: a pure function of (seed, n), so it survives any resume.

All ranks compute the same, and nothing is counted on the way that a restart could lose.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from flow_rl.flow.noise import Stream, keyed_generator

#: fractional part of the golden ratio: its multiples fill [0, 1) as evenly as a sequence can (Kronecker, Weyl)
_STRIDE = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, kw_only=True)
class TaskRatios:
    """How often each task comes, from some batch on."""

    start: int = 0
    """First batch for which these ratios hold, counted from 0."""
    ratios: Mapping[str, float] = field(default_factory=dict)
    """Share of each task, by name, in any unit: {t2i: 1, edit: 1} is half and half. 0 leaves a task out."""


class TaskSchedule:
    """Tasks of an endless stream of single-task batches.

    Batch n takes the task whose share of [0, 1) holds `frac(offset + n * golden ratio)`. Among any n batches
    in a row under fixed ratios a task's count stays within a few of its share, without the rigid order that
    a round-robin has.

    Args:
        stages: ratios by the batch from which they hold; the first starts at 0.
        seed: shifts the sequence.

    Raises:
        ValueError: no stage, stages out of order, negative ratios, or a stage in which nothing is left.
    """

    def __init__(self, stages: Sequence[TaskRatios], *, seed: int = 0) -> None:
        _check(stages)
        self._starts = [stage.start for stage in stages]
        self._bounds = [_shares(stage.ratios) for stage in stages]
        generator = keyed_generator(seed=seed, step=0, stream=Stream.DATA)
        self._offset = float(torch.rand((), generator=generator, dtype=torch.float64))
        #: every task that comes at some time, in the order of the first stage that names it
        self.tasks = tuple(dict.fromkeys(name for bounds in self._bounds for name, _ in bounds))

    def task(self, batch: int) -> str:
        """Name of the task of batch `batch`, from 0 up."""
        bounds = self._bounds[bisect.bisect_right(self._starts, batch) - 1]
        point = math.fmod(self._offset + batch * _STRIDE, 1.0)
        return next((name for name, end in bounds if point < end), bounds[-1][0])

    def counts(self, before: int) -> dict[str, int]:
        """How many of the first `before` batches are of each task: the position in each task's own stream."""
        counts = dict.fromkeys(self.tasks, 0)
        for batch in range(before):
            counts[self.task(batch)] += 1
        return counts


def _shares(ratios: Mapping[str, float]) -> list[tuple[str, float]]:
    """Each task with the upper end of its part of [0, 1); tasks that never come are left out."""
    total, end, bounds = sum(ratios.values()), 0.0, []
    for name, ratio in ratios.items():
        if ratio > 0:
            end += ratio / total
            bounds.append((name, end))
    return bounds


def _check(stages: Sequence[TaskRatios]) -> None:
    if not stages:
        raise ValueError("A task schedule needs at least one stage of ratios, such as {start: 0, ratios: {t2i: 1}}.")
    starts = [stage.start for stage in stages]
    if starts[0] != 0 or any(after <= now for now, after in pairwise(starts)):
        raise ValueError(f"The stages of a task schedule must start at 0 and ascend; received starts {starts}.")
    for stage in stages:
        values = list(stage.ratios.values())
        if not values or not all(0 <= value < math.inf for value in values) or sum(values) <= 0:
            raise ValueError(
                f"Task ratios must be non-negative numbers, at least one of them above 0; received "
                f"{dict(stage.ratios)} from batch {stage.start} on."
            )
