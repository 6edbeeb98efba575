"""Several tasks in one run (Mix-RL): every iteration takes prompts and edits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import ConcatDataset, DataLoader, IterableDataset
from typing_extensions import override

from datamodules.edit_pairs import EditPairDataModule
from datamodules.prompts import PromptDataModule, PromptStream, TaskDataModule, whole_batches
from flow_rl.batches import TaskBatches


class TaskStream(IterableDataset):
    """Batches of several streams, side by side: the k-th holds the k-th of each.

    Args:
        streams: one a task.
    """

    def __init__(self, streams: list[PromptStream]) -> None:
        self.streams = streams

    def __iter__(self) -> Iterator[TaskBatches]:
        for parts in zip(*self.streams, strict=True):
            yield TaskBatches(parts=parts)


class MixedTaskDataModule(TaskDataModule):
    """Text-to-image prompts and edits for `fit`; both, one task after the other, for `validate`, `test` and `predict`.

    An iteration takes `prompts_per_step` of each task's own module and is one optimizer step; groups are of one task.
    Orders, seeds and batch sizes are the tasks' own. The two files may use the same ids.

    Args:
        t2i: prompts.
        edit: edits.
    """

    def __init__(self, t2i: PromptDataModule, edit: EditPairDataModule) -> None:
        super().__init__()
        if isinstance(t2i, EditPairDataModule):
            raise ValueError(
                "data.t2i holds edits; give it a datamodules.PromptDataModule, and the edits to data.edit."
            )
        self.tasks = (t2i, edit)

    @override
    def by_task(self) -> dict[str, PromptDataModule]:
        return {part.task: part for part in self.tasks}

    @override
    def order(self) -> dict[str, str | int]:
        parts = [(part.task, part.order()) for part in self.tasks]
        return {
            name.replace("data.", f"data.{task}.") if "data." in name else f"{name} ({task})": value
            for task, order in parts
            for name, value in order.items()
        }

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"restrictions": {part.task: part.restriction for part in self.tasks}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for part in self.tasks:
            part.expect(state_dict.get("restrictions", {}).get(part.task, ""))

    @override
    def teardown(self, stage: str) -> None:
        for part in self.tasks:
            part.teardown(stage)

    @override
    def train_dataloader(self) -> DataLoader:
        where = {"start": self.position, "rank": self.rank, "world_size": self.world_size}
        return whole_batches(TaskStream([task.stream(**where) for task in self.tasks]))

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
        return whole_batches(ConcatDataset([task.fixed(split) for task in self.tasks]))
