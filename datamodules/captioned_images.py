"""Captioned images and edit pairs, mixed, for flow matching.

Shapes: H height, W width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from datamodules.stream import StreamedDataModule, batch_indices
from flow_rl.batches import Captioned

Example = tuple[Tensor, str, Tensor | None]


class CaptionedDataset(ABC):
    """Images with text. `prepare` may download or render; it runs before anything is read."""

    def prepare(self) -> None:  # noqa: B027  (most data sets have nothing to prepare)
        """Make the data ready."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of examples."""

    @abstractmethod
    def __getitem__(self, index: int) -> Example:
        """(image in [0, 1] of shape (3, H, W), caption, source image or None)."""


class CaptionedStream(IterableDataset):
    """An endless stream of batches; examples of similar text length and of one task are batched together.

    A generator evaluates prompts of different length apart, so batches of few lengths are faster. Shuffled pools of
    `pool` batches are sorted by task and length, cut, and the batches shuffled.

    Args:
        dataset: the examples.
        batch_size: examples a batch.
        seed: of the order.
        start: the first batch.
        pool: batches sorted together.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        dataset: CaptionedDataset,
        *,
        batch_size: int,
        seed: int,
        start: int = 0,
        pool: int = 32,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.dataset, self.batch_size, self.seed, self.start = dataset, batch_size, seed, start
        self.pool = max(1, min(pool, len(dataset) // batch_size))
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[Captioned]:
        number, skip = divmod(self.start, self.pool)
        while True:
            pool = batch_indices(len(self.dataset), self.batch_size * self.pool, seed=self.seed, batch=number)
            examples = sorted((self.dataset[i] for i in pool), key=lambda e: (e[2] is not None, len(e[1].split())))
            order = torch.randperm(self.pool, generator=torch.Generator().manual_seed(number)).tolist()
            for position in order[skip:]:
                batch = examples[position * self.batch_size : (position + 1) * self.batch_size]
                yield _of_one_task(batch, self.rank, self.world_size)
            number, skip = number + 1, 0


def _of_one_task(batch: list[Example], rank: int = 0, world_size: int = 1) -> Captioned:
    """A rank's share of the batch; only the larger task where a batch straddles the border between two."""
    edits = [e for e in batch if e[2] is not None]
    kept = edits if 2 * len(edits) >= len(batch) else [e for e in batch if e[2] is None]
    mine = range(rank, len(kept), world_size)
    if not mine:
        raise ValueError(f"data.batch_size is {len(batch)}, too few for {world_size} ranks: make it larger.")
    return Captioned(
        images=torch.stack([kept[i][0] for i in mine]),
        captions=tuple(kept[i][1] for i in mine),
        positions=tuple(mine),
        total=len(kept),
        sources=torch.stack([kept[i][2] for i in mine]) if kept is edits else None,
    )


class CaptionedImageDataModule(StreamedDataModule):
    """Training and validation data of flow matching.

    Args:
        train: examples to train on.
        validation: held-out examples.
        batch_size: examples a step, over all ranks.
        seed: of the order.
    """

    def __init__(
        self, train: CaptionedDataset, validation: CaptionedDataset, batch_size: int = 64, seed: int = 0
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"data.batch_size is {batch_size}; it must be at least 1.")
        if batch_size > len(train):
            raise ValueError(f"data.batch_size is {batch_size}, but data.train has {len(train)} examples.")
        self.train, self.validation = train, validation
        self.batch_size, self.seed = batch_size, seed

    @override
    def prepare_data(self) -> None:
        self.train.prepare()
        self.validation.prepare()

    @override
    def setup(self, stage: str) -> None:
        self.prepare_data()

    @override
    def train_dataloader(self) -> DataLoader:
        stream = CaptionedStream(
            self.train,
            batch_size=self.batch_size,
            seed=self.seed,
            start=self.position,
            rank=self.rank,
            world_size=self.world_size,
        )
        return DataLoader(stream, batch_size=None)

    @override
    def val_dataloader(self) -> DataLoader:
        examples = sorted(
            (self.validation[i] for i in range(len(self.validation))),
            key=lambda e: (e[2] is not None, len(e[1].split())),
        )
        batches: list[Captioned] = []
        for task in (False, True):
            chosen = [e for e in examples if (e[2] is not None) is task]
            for start in range(0, len(chosen), self.batch_size):
                batches.append(_of_one_task(chosen[start : start + self.batch_size]))
        return DataLoader(batches, batch_size=None, shuffle=False)
