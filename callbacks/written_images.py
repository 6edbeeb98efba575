"""How much room the images need that a callback will write: disks are looked at before they are drawn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from lightning import LightningModule, Trainer

from flow_rl.batches import PromptData, PromptTable


class WritesImages(ABC):
    """A callback whose images count among what a run needs room for."""

    @abstractmethod
    def image_bytes(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> Mapping[Path, int]:
        """Bytes by folder that the callback will write in a stage (`fit`, `test`, `predict`), rather too many."""


def bytes_of_images(count: int, pl_module: LightningModule) -> int:
    """Bytes of so many images of a module, as if they could not be compressed; 0 where their size is not known."""
    size = getattr(pl_module, "image_size", None) or 0
    return int(count * 3 * size * size)


def tables(trainer: Trainer, split: str) -> list[PromptTable]:
    """The prompts of a split, a table a task; none where the data are no prompts."""
    data = getattr(trainer, "datamodule", None)
    parts = data.by_task().values() if isinstance(data, PromptData) else ()
    return [table for part in parts if (table := getattr(part, split, None)) is not None]


def validations(trainer: Trainer, updates_per_step: int) -> int:
    """How often a `fit` validates; 1 where it has no end."""
    every = trainer.val_check_interval
    if trainer.limit_val_batches == 0:
        return 0
    if trainer.max_steps < 1 or not isinstance(every, int) or every < 1:
        return 1
    return trainer.max_steps // updates_per_step // every
