"""Batches of one task each, tasks taking turns by a ratio schedule: what distillation trains on.

Mix-RL takes every task in every iteration instead: see `datamodules.mixed`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from datamodules.edit_pairs import EditPairDataModule
from datamodules.mixed import MixedTaskDataModule
from datamodules.prompts import PromptDataModule, whole_batches
from datamodules.task_schedule import TaskRatios, TaskSchedule
from flow_rl.batches import TASKS, Prompts
from flow_rl.suggestions import nearest


class AlternatingStream(IterableDataset):
    """An endless stream of single-task batches: each task's own stream, interleaved by the schedule.

    Args:
        modules: data of each task, by name.
        schedule: of the tasks.
        start: the first batch.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        modules: Mapping[str, PromptDataModule],
        schedule: TaskSchedule,
        *,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.schedule, self.start = schedule, start
        before = schedule.counts(start)
        self.streams = {
            name: modules[name].stream(start=before[name], rank=rank, world_size=world_size) for name in schedule.tasks
        }

    def __iter__(self) -> Iterator[Prompts]:
        iterators = {name: iter(stream) for name, stream in self.streams.items()}
        batch = self.start
        while True:
            yield next(iterators[self.schedule.task(batch)])
            batch += 1


class AlternatingTaskDataModule(MixedTaskDataModule):
    """As `MixedTaskDataModule`, but a training batch is of one task, which the schedule says.

    Args:
        t2i: prompts.
        edit: edits.
        schedule: ratios of the tasks `t2i` and `edit` by the batch from which they hold; None takes both equally often.
        seed: of the order of tasks.
    """

    def __init__(
        self,
        t2i: PromptDataModule,
        edit: EditPairDataModule,
        schedule: list[TaskRatios] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(t2i, edit)
        self.schedule = TaskSchedule(schedule or [TaskRatios(ratios=dict.fromkeys(TASKS, 1.0))], seed=seed)
        for name in self.schedule.tasks:
            if name not in TASKS:
                hint = nearest(name, TASKS)
                raise ValueError(f"data.schedule names the task '{name}'; the tasks are {', '.join(TASKS)}.{hint}")

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks that training batches are of."""
        return self.schedule.tasks

    @override
    def task_at(self, batch: int) -> str:
        return self.schedule.task(batch)

    @property
    @override
    def prompts_per_iteration(self) -> int:
        """The most prompts that an iteration takes: those of the larger task, as a batch is of one."""
        return max(part.prompts_per_step for part in self.tasks)

    @override
    def train_dataloader(self) -> DataLoader:
        where = {"start": self.position, "rank": self.rank, "world_size": self.world_size}
        return whole_batches(AlternatingStream(dict(zip(TASKS, self.tasks, strict=True)), self.schedule, **where))
