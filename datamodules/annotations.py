"""Scored images for training and checking reward models: streams of batches, and the data module.

Files are those of `datamodules.annotation_files`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from datamodules.annotation_files import Annotation, AnnotationBatch, read_annotation_files
from datamodules.faults import Faults
from datamodules.held_out import content_of
from datamodules.stream import StreamedDataModule, batch_indices
from flow_rl.messages import warn_on_first_rank


class AnnotationStream(IterableDataset):
    """An endless stream of shuffled batches, the same for any number of ranks: each takes its slice of a batch.

    Args:
        annotations: all of them.
        batch_size: images of one forward, over all ranks.
        seed: of the order.
        start: the first batch.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        annotations: Sequence[Annotation],
        *,
        batch_size: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_share(batch_size, world_size)
        self.annotations, self.batch_size, self.seed, self.start = annotations, batch_size, seed, start
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[AnnotationBatch]:
        share, batch = self.batch_size // self.world_size, self.start
        while True:
            indices = batch_indices(len(self.annotations), self.batch_size, seed=self.seed, batch=batch)
            mine = indices[self.rank * share : (self.rank + 1) * share]
            yield AnnotationBatch(examples=tuple(self.annotations[i].load() for i in mine))
            batch += 1


class FixedAnnotations(IterableDataset):
    """Every annotation once, in order; each rank takes every `world_size`-th, so none is seen twice.

    Args:
        annotations: all of them.
        batch_size: images of a batch, on each rank.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(
        self, annotations: Sequence[Annotation], *, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.mine, self.batch_size = list(annotations)[rank::world_size], batch_size

    def __len__(self) -> int:
        return -(-len(self.mine) // self.batch_size)

    def __iter__(self) -> Iterator[AnnotationBatch]:
        for start in range(0, len(self.mine), self.batch_size):
            part = self.mine[start : start + self.batch_size]
            yield AnnotationBatch(examples=tuple(a.load() for a in part))


def check_share(batch_size: int, world_size: int) -> None:
    """Refuse a batch that the ranks cannot share evenly.

    Raises:
        ValueError: with a size that would do.
    """
    if batch_size % world_size:
        raise ValueError(
            f"data.batch_size is {batch_size}, which {world_size} ranks cannot share evenly: make it a multiple of "
            f"{world_size}."
        )


class AnnotationDataModule(StreamedDataModule):
    """Scored images from files, several dimensions mixed, for `fit`, `validate` and `test`.

    Args:
        train_files: to train on.
        validation_files: held out, scored as training goes on.
        test_files: held out, for `test`; the validation files if none are given.
        dimensions: keep these alone; None keeps all.
        batch_size: images of one forward, over all ranks (trainer.accumulate_grad_batches makes larger steps).
        eval_batch_size: images scored at a time in `validate` and `test`, on each rank.
        max_validation: use at most so many validation images, evenly from the files; None for all.
        seed: of the order.
    """

    #: whether it trains on annotations alone, and so can't do without
    needs_annotations = True

    def __init__(
        self,
        train_files: list[str],
        validation_files: list[str],
        test_files: list[str] | None = None,
        dimensions: list[str] | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        max_validation: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1 or eval_batch_size < 1:
            raise ValueError(
                f"data.batch_size ({batch_size}) and data.eval_batch_size ({eval_batch_size}) must be at least 1."
            )
        self.batch_size, self.eval_batch_size, self.seed = batch_size, eval_batch_size, seed
        # Read here rather than in `setup`: a bad file must end the run before a model loads.
        faults = Faults()
        self.train: list[Annotation] = []
        validation: list[Annotation] = []
        if train_files or self.needs_annotations:
            with faults.collect():
                self.train = read_annotation_files(train_files, dimensions, "train_files")
        with faults.collect():
            validation = read_annotation_files(validation_files, dimensions, "validation_files")
        self.test = validation
        if test_files:
            with faults.collect():
                self.test = read_annotation_files(test_files, dimensions, "test_files")
        faults.check()
        self.validation = spread(validation, max_validation)
        self.contents = [content_of(path) for path in train_files]
        warn_of_shared_images(self.train, validation, "validation_files")
        if test_files:
            warn_of_shared_images(self.train, self.test, "test_files")
        if self.needs_annotations and batch_size > len(self.train):
            raise ValueError(f"data.batch_size is {batch_size}, but data.train_files have {len(self.train)} images.")

    @property
    def dimensions(self) -> list[str]:
        """Every dimension that occurs."""
        return sorted({a.dimension for a in (*self.train, *self.validation, *self.test)})

    @property
    def has_reasoning(self) -> bool:
        """Whether every training example comes with a reasoning."""
        return all(a.reasoning for a in self.train)

    @property
    def any_reasoning(self) -> bool:
        """Whether some training example comes with a reasoning."""
        return any(a.reasoning for a in self.train)

    @override
    def train_dataloader(self) -> DataLoader:
        stream = AnnotationStream(
            self.train, batch_size=self.batch_size, seed=self.seed, start=self.position, **self._share()
        )
        return DataLoader(stream, batch_size=None)

    @override
    def val_dataloader(self) -> DataLoader:
        return self._fixed(self.validation)

    @override
    def test_dataloader(self) -> DataLoader:
        return self._fixed(self.test)

    @override
    def order(self) -> dict[str, str | int]:
        return {
            "the content of data.train_files": " ".join(self.contents),
            "the number of training images": len(self.train),
            "data.batch_size": self.batch_size,
            "data.seed": self.seed,
        }

    def _fixed(self, annotations: Sequence[Annotation]) -> DataLoader:
        return DataLoader(
            FixedAnnotations(annotations, batch_size=self.eval_batch_size, **self._share()), batch_size=None
        )

    def _share(self) -> dict[str, int]:
        return {"rank": self.rank, "world_size": self.world_size}


def warn_of_shared_images(train: Sequence[Annotation], held: Sequence[Annotation], name: str) -> None:
    """Warn of held-out images that are trained on, whatever their files are called.

    Args:
        train: trained on.
        held: held out.
        name: of the setting of the held-out files.
    """
    known = {_judged(annotation) for annotation in train}
    both = [annotation for annotation in held if _judged(annotation) in known]
    if both:
        warn_on_first_rank(
            f"{len(both)} of the {len(held)} rows of data.{name} are in data.train_files as well (for example "
            f"'{both[0].image}', id {both[0].id!r}): scores on images that are trained on say nothing of others. Name "
            "files of held-out images."
        )


def _judged(annotation: Annotation) -> tuple[str, str, str]:
    """What makes two annotations the same question."""
    return annotation.dimension, annotation.prompt, os.path.abspath(annotation.image)


def spread(annotations: list[Annotation], most: int | None) -> list[Annotation]:
    """At most `most` annotations, evenly spaced over the list, so that every file and dimension keeps its share."""
    if most is None or most >= len(annotations):
        return annotations
    if most < 1:
        raise ValueError(f"data.max_validation is {most}; it must be at least 1, or null for all.")
    return [annotations[i * len(annotations) // most] for i in range(most)]
