"""What a batch holds, for every stage, and what is known of the data that batches come from.

Shapes: P prompts, N samples, H height, W width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

#: what a prompt asks for: an image, or an edit of one
TASKS = ("t2i", "edit")


class TaskPrompts(Protocol):
    """The prompts of one task.

    Attributes:
        prompts_per_step: prompts of one iteration, over all ranks.
        eval_batch_size: prompts that are drawn at a time in an evaluation, over all ranks.
        image_size: height and width of source images in pixels; None for prompts without them.
    """

    prompts_per_step: int
    eval_batch_size: int
    image_size: int | None


class PromptData(ABC):
    """Data whose training batches are prompts, of one task or of several."""

    @abstractmethod
    def by_task(self) -> Mapping[str, TaskPrompts]:
        """The prompts of each task, by its name, one of `TASKS`."""

    def task_at(self, batch: int) -> str | None:
        """The task of a training batch, counted from the start of the run; None where batches are all alike."""
        return None

    @property
    def prompts_per_iteration(self) -> int:
        """The most prompts that an iteration takes, over all ranks: here those of all tasks together."""
        return sum(part.prompts_per_step for part in self.by_task().values())

    @property
    def edits(self) -> bool:
        """Whether any of the prompts come with source images; a run is then planned as if all did."""
        return "edit" in self.by_task()


class PromptTable(ABC):
    """Prompts by row, whose batches can be had one at a time.

    Attributes:
        ids: stable integers that key the noise and the groups, one a row.
        categories: semantic category of each row.
    """

    ids: tuple[int, ...]
    categories: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def select(self, index: list[int]) -> Prompts:
        """The prompts at `index`, in that order, with their source images."""

    @abstractmethod
    def subset(self, index: list[int]) -> PromptTable:
        """A table of the rows at `index`, in that order."""


@dataclass(frozen=True, kw_only=True)
class Prompts(PromptTable):
    """A batch of prompts.

    Attributes:
        ids: stable integers that key the noise and the groups, length P.
        texts: prompts, or instructions for edits, length P.
        categories: semantic category of each, length P.
        sources: for edits, source images in [0, 1], shape (P, 3, H, W).
    """

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    categories: tuple[str, ...]
    sources: Tensor | None = None

    @property
    def task(self) -> str:
        """`edit` where there are source images, else `t2i`."""
        return task_of(self.sources)

    @property
    def groups(self) -> Tensor:
        """Id of each prompt's group, int64 (P,); stable, and another one for an edit with the id of a prompt."""
        return torch.tensor(self.ids, dtype=torch.int64) * len(TASKS) + TASKS.index(self.task)

    def select(self, index: list[int]) -> Prompts:
        """The prompts at `index`, in that order."""
        return Prompts(
            ids=tuple(self.ids[i] for i in index),
            texts=tuple(self.texts[i] for i in index),
            categories=tuple(self.categories[i] for i in index),
            sources=None if self.sources is None else self.sources[index],
        )

    def subset(self, index: list[int]) -> Prompts:
        """See `PromptTable.subset`: everything is in memory, so a subset is a selection."""
        return self.select(index)

    def parts(self, size: int) -> Iterator[Prompts]:
        """Pieces of at most `size` prompts, in order."""
        for start in range(0, len(self), size):
            yield self.select(list(range(start, min(start + size, len(self)))))

    def repeat_interleave(self, times: int) -> Prompts:
        """Every prompt `times` times, copies side by side."""
        return self.select([i for i in range(len(self)) for _ in range(times)])

    def to(self, device: torch.device) -> Prompts:
        """The same batch with its tensors on `device`."""
        return self if self.sources is None else replace(self, sources=self.sources.to(device))


@dataclass(frozen=True, kw_only=True)
class TaskBatches:
    """One iteration on several tasks: gradients accumulate over the parts into one optimizer step.

    Attributes:
        parts: batches, each of one task.
    """

    parts: tuple[Prompts, ...]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def to(self, device: torch.device) -> TaskBatches:
        """The same batches with their tensors on `device`."""
        return TaskBatches(parts=tuple(part.to(device) for part in self.parts))


def task_of(sources: Tensor | None) -> str:
    """The task, one of `TASKS`, of samples with these source images."""
    return "t2i" if sources is None else "edit"


def labels(categories: Sequence[str], tasks: Sequence[str]) -> list[str]:
    """How logs name each sample's category: an edit's is `edit/<category>`, as both tasks may have one of a name."""
    return [c if task == "t2i" else f"{task}/{c}" for c, task in zip(categories, tasks, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Captioned:
    """Images with the text that describes them; with sources, edit targets with their instructions.

    Attributes:
        images: float32 in [0, 1], shape (N, 3, H, W).
        captions: texts, length N.
        positions: of each in the batch of all ranks, length N; what is drawn for a sample is drawn by it.
        total: samples of all ranks together.
        sources: source images in [0, 1], shape (N, 3, H, W); None for text-to-image.
    """

    images: Tensor
    captions: tuple[str, ...]
    positions: tuple[int, ...]
    total: int
    sources: Tensor | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def to(self, device: torch.device) -> Captioned:
        """The same batch with its tensors on `device`."""
        sources = None if self.sources is None else self.sources.to(device)
        return replace(self, images=self.images.to(device), sources=sources)
