"""The order of training data: a pure function of (seed, position), so a resume needs nothing but the position."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningDataModule
from typing_extensions import override


def epoch_order(length: int, *, seed: int, epoch: int) -> list[int]:
    """A permutation of `range(length)` that depends on (seed, epoch) alone."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 31))
    return torch.randperm(length, generator=generator).tolist()


def batch_indices(length: int, batch_size: int, *, seed: int, batch: int) -> list[int]:
    """Indices of the `batch`-th batch of an endless stream of shuffled epochs, whole batches only.

    Raises:
        ValueError: more indices asked for than there are.
    """
    if batch_size > length:
        raise ValueError(f"A batch of {batch_size} was asked of {length} items: lower the batch, or add data.")
    per_epoch = length // batch_size  # whole batches: the few left over come in another epoch's shuffle
    epoch, position = divmod(batch, per_epoch)
    return epoch_order(length, seed=seed, epoch=epoch)[position * batch_size : (position + 1) * batch_size]


class StreamedDataModule(LightningDataModule):
    """A data module whose training data are an endless stream; a resumed run goes on with the next batch."""

    #: the first batch of the stream to come
    position = 0

    @property
    def rank(self) -> int:
        """Of this process; 0 without a trainer."""
        return 0 if self.trainer is None else self.trainer.global_rank

    @property
    def world_size(self) -> int:
        """Number of processes; 1 without a trainer."""
        return 1 if self.trainer is None else self.trainer.world_size

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"position": self.trainer.fit_loop.epoch_loop.batch_progress.total.processed}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.position = state_dict["position"]
