"""Batches of one task each, tasks taking turns by a ratio schedule: what distillation trains on.

Mix-RL takes every task in every iteration instead: see `datamodules.mixed`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping

from torch.utils.data import ConcatDataset, DataLoader, IterableDataset
from typing_extensions import override

from datamodules.batches import Prompts
from datamodules.prompts import PromptDataModule, whole_batches
from datamodules.stream import StreamedDataModule
from datamodules.task_schedule import TaskRatios, TaskSchedule


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


class AlternatingTaskDataModule(StreamedDataModule):
    """Prompt and edit files of several tasks, one task a batch.

    `validate`, `test` and `predict` go through the tasks one after the other, always in the same order.

    Args:
        tasks: data of each task, by the task's name (`t2i`, `edit`); each has its own batch size and seed.
        schedule: ratios by the batch from which they hold; None takes the tasks equally often.
        seed: of the order of tasks.
    """

    def __init__(
        self, tasks: dict[str, PromptDataModule], schedule: list[TaskRatios] | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        if not tasks:
            raise ValueError("data.tasks is empty: name at least one task, such as t2i.")
        self.modules = tasks
        self.schedule = TaskSchedule(schedule or [TaskRatios(ratios=dict.fromkeys(tasks, 1.0))], seed=seed)
        for name in self.schedule.tasks:
            if name not in tasks:
                near = difflib.get_close_matches(name, list(tasks), 1)
                hint = f" Did you mean '{near[0]}'?" if near else ""
                raise ValueError(f"data.schedule names the task '{name}'; data.tasks has {', '.join(tasks)}.{hint}")
        for name, module in tasks.items():
            found = _task_of(module)
            if found != name:
                raise ValueError(
                    f"data.tasks.{name} holds {found} prompts: edits have a source image each, text-to-image prompts "
                    f"none. Call it '{found}', or give it another file."
                )

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that training batches are of."""
        return self.schedule.tasks

    def task_at(self, batch: int) -> str:
        """Task of the training batch `batch`, counted from the start of the run."""
        return self.schedule.task(batch)

    @override
    def train_dataloader(self) -> DataLoader:
        stream = AlternatingStream(
            self.modules, self.schedule, start=self.position, rank=self.rank, world_size=self.world_size
        )
        return whole_batches(stream)

    @override
    def val_dataloader(self) -> DataLoader:
        return self._fixed("validation")

    @override
    def test_dataloader(self) -> DataLoader:
        return self._fixed("test")

    @override
    def predict_dataloader(self) -> DataLoader:
        return self._fixed("test")

    def _fixed(self, split: str) -> DataLoader:
        return whole_batches(ConcatDataset([module.fixed(split) for module in self.modules.values()]))


def _task_of(module: PromptDataModule) -> str:
    """Task of a data module's prompts, read off its first one."""
    return module.validation.select([0]).task
