"""The order of training data: a pure function of (seed, position), so a resume needs nothing but the position."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningDataModule
from typing_extensions import override

from flow_rl.messages import warn_on_first_rank


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

    def order(self) -> dict[str, str | int]:
        """What the order of training data depends on, by setting; content stands for a file wherever it lies."""
        return {}

    @override
    def state_dict(self) -> dict[str, Any]:
        position = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed
        return {"position": position, "order": self.order()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.position = state_dict["position"]
        # Checkpoints of earlier versions do not say; an evaluation takes nothing from the stream.
        before, now = state_dict.get("order"), self.order()
        fits = self.trainer is None or self.trainer.state.fn in (None, "fit")
        if before is not None and before != now and fits:
            changes = [
                f"{name} was {before.get(name, 'not set')} and is {now.get(name, 'not set')}"
                for name in dict.fromkeys([*before, *now])
                if before.get(name) != now.get(name)
            ]
            warn_on_first_rank(
                f"The run resumes at batch {self.position}, and its training data are not those of the checkpoint: "
                f"{'; '.join(changes)}. Some rows will come again in this epoch and others not at all. Set these back "
                "to resume the same run."
            )
