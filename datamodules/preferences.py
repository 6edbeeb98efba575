"""Which of two images is better: from preference files, or derived from scored images.

A line of a preference file is `{"id", "prompt", "chosen", "rejected", "dimension"}` with optional `"source"`; paths are
relative to the file. Pairs derived from annotations use each image at most once an epoch, so a pairwise
model can be compared with a pointwise one on the same pool and the same number of images.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from datamodules.annotation_files import Annotation, LoadedAnnotation, uses_of
from datamodules.annotations import AnnotationDataModule, check_share
from datamodules.faults import Faults
from datamodules.jsonl import read_rows
from datamodules.pictures import PictureUse, check_pictures
from datamodules.stream import epoch_order

Match = Literal["dimension", "prompt", "group"]


class Pair(NamedTuple):
    """Two annotations of one dimension, the better one first."""

    chosen: Annotation
    rejected: Annotation


@dataclass(frozen=True, kw_only=True)
class PreferenceBatch:
    """What a step on pairs gets.

    Attributes:
        chosen: the better image of each pair.
        rejected: the other ones, in the same order.
    """

    chosen: tuple[LoadedAnnotation, ...]
    rejected: tuple[LoadedAnnotation, ...]

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def reasoned(self) -> list[bool]:
        """Whether both images of each pair have a reasoning."""
        pairs = zip(self.chosen, self.rejected, strict=True)
        return [bool(c.annotation.reasoning and r.annotation.reasoning) for c, r in pairs]

    def take(self, rows: Sequence[int]) -> PreferenceBatch:
        """Some of the pairs, in the order asked for."""
        return PreferenceBatch(
            chosen=tuple(self.chosen[i] for i in rows), rejected=tuple(self.rejected[i] for i in rows)
        )


def read_preferences(path: str | Path) -> list[Pair]:
    """All pairs of a preference file; no scores and no reasoning are known of them.

    Raises:
        DataError: see `pairs_of`.
    """
    faults = Faults()
    found = pairs_of(path, faults)
    faults.check()
    return found


def pairs_of(path: str | Path, faults: Faults) -> list[Pair]:
    """The pairs of a preference file that are right.

    Args:
        path: the file.
        faults: takes rows that are wrong (see `read_rows`): an image that is not there or can't be read, or a pair of
            one image with itself.

    Raises:
        DataError: a file that cannot be read at all.
    """
    path = Path(path)

    def complaint(record: dict) -> str | None:
        if os.path.normpath(record["chosen"]) == os.path.normpath(record["rejected"]):
            return f"'chosen' and 'rejected' are the same image, '{record['chosen']}'."
        return None

    fields = {"id": object, "prompt": str, "chosen": str, "rejected": str, "dimension": str}
    rows = read_rows(
        path,
        fields,
        optional={"source": str},
        texts=("prompt",),
        names=("dimension",),
        check=complaint,
        faults=faults,
    )
    pictures = [uses_of(path, row, ("chosen", "rejected", "source")) for row in rows]
    check_pictures([use for uses in pictures for use in uses.values()], faults)

    def member(record: dict, key: str, uses: dict[str, PictureUse]) -> Annotation:
        return Annotation(
            id=f"{record['id']}/{key}",
            dimension=record["dimension"],
            prompt=record["prompt"],
            image=path.parent / record[key],
            score=float("nan"),
            reasoning="",
            source=path.parent / record["source"] if "source" in record else None,
            pictures={
                ("source" if name == "source" else "image"): uses[name] for name in uses if name in (key, "source")
            },
        )

    return [
        Pair(member(r, "chosen", uses), member(r, "rejected", uses))
        for r, uses in zip((row.record for row in rows), pictures, strict=True)
    ]


class PairSource:
    """Pairs of every epoch: the given ones, and others drawn anew each epoch from annotations.

    Within a bucket (a dimension, or a prompt or group of one) the images are ordered by score, equal scores shuffled,
    the scores' order drawn at random, and image i is paired with image i + n/2. That gives the largest possible number
    of pairs of different scores, the same number every epoch.

    Args:
        pairs: pairs that are known.
        annotations: scored images to derive pairs from.
        match: what two images must have in common.
        seed: of the pairing.
    """

    def __init__(self, pairs: Sequence[Pair], annotations: Sequence[Annotation], *, match: Match, seed: int) -> None:
        self.pairs, self.annotations, self.seed = list(pairs), list(annotations), seed
        self.buckets: dict[tuple, list[int]] = {}
        for i, annotation in enumerate(self.annotations):
            key = (annotation.dimension, *(() if match == "dimension" else (getattr(annotation, match),)))
            if match == "group" and annotation.group is None:
                raise ValueError(f"data.match is 'group', but the annotation with id {annotation.id!r} has none.")
            self.buckets.setdefault(key, []).append(i)
        # one epoch is kept: batches of an epoch follow each other
        self.epoch = lru_cache(maxsize=1)(self._epoch)
        self.length = len(self.epoch(0))

    def __len__(self) -> int:
        return self.length

    def _epoch(self, epoch: int) -> list[Pair]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % (1 << 31))
        found = list(self.pairs)
        for bucket in self.buckets.values():
            for i, j in self._pair_up(bucket, generator):
                a, b = self.annotations[i], self.annotations[j]
                found.append(Pair(a, b) if a.score > b.score else Pair(b, a))
        return [found[i] for i in epoch_order(len(found), seed=self.seed, epoch=epoch)]

    def _pair_up(self, bucket: list[int], generator: torch.Generator) -> Iterator[tuple[int, int]]:
        shuffled = [bucket[i] for i in torch.randperm(len(bucket), generator=generator).tolist()]
        by_score: dict[float, list[int]] = {score: [] for score in sorted({self.annotations[i].score for i in bucket})}
        for i in shuffled:
            by_score[self.annotations[i].score].append(i)
        if len(bucket) % 2:  # one stays alone: of the commonest score, which leaves the most pairs
            max(by_score.values(), key=len).pop()
        classes = list(by_score.values())
        order = [i for k in torch.randperm(len(classes), generator=generator).tolist() for i in classes[k]]
        half = len(order) // 2
        for i, j in zip(order[:half], order[half:], strict=True):
            if self.annotations[i].score != self.annotations[j].score:
                yield i, j


class PreferenceStream(IterableDataset):
    """An endless stream of batches of pairs, the same for any number of ranks: each takes its slice of a batch.

    Args:
        source: of the pairs.
        batch_size: pairs of one forward, over all ranks.
        start: the first batch.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(
        self, source: PairSource, *, batch_size: int, start: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        check_share(batch_size, world_size)
        self.source, self.batch_size, self.start = source, batch_size, start
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[PreferenceBatch]:
        share, batch = self.batch_size // self.world_size, self.start
        per_epoch = len(self.source) // self.batch_size
        while True:
            epoch, position = divmod(batch, per_epoch)
            first = position * self.batch_size + self.rank * share
            yield load_pairs(self.source.epoch(epoch)[first : first + share])
            batch += 1


def load_pairs(pairs: Sequence[Pair]) -> PreferenceBatch:
    """Read the images of the pairs."""
    return PreferenceBatch(
        chosen=tuple(p.chosen.load() for p in pairs), rejected=tuple(p.rejected.load() for p in pairs)
    )


class PreferenceDataModule(AnnotationDataModule):
    """Pairs to train on; validation and test score single images, as for pointwise training, so both compare.

    The settings of `AnnotationDataModule` mean the same here: the batch is counted in images, two a pair.

    Args:
        train_files: annotations to derive pairs from; may be empty if there are preference files.
        validation_files: annotations, held out.
        test_files: annotations for `test`; the validation files if none are given.
        preference_files: pairs that are known.
        match: what the images of a derived pair must have in common, besides the dimension.
        dimensions: keep these alone; None keeps all.
        batch_size: images of one forward, over all ranks: half as many pairs.
        eval_batch_size: images scored at a time, on each rank.
        max_validation: use at most so many validation images; None for all.
        seed: of pairs and order.
    """

    needs_annotations = False

    def __init__(
        self,
        train_files: list[str],
        validation_files: list[str],
        test_files: list[str] | None = None,
        preference_files: list[str] | None = None,
        match: Match = "dimension",
        dimensions: list[str] | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        max_validation: int | None = None,
        seed: int = 0,
    ) -> None:
        if batch_size < 2 or batch_size % 2:
            raise ValueError(f"data.batch_size is {batch_size}; pairs need an even number of images.")
        faults, known = Faults(), []
        for path in preference_files or ():
            with faults.collect():
                known += pairs_of(path, faults)
        faults.check()
        known = [p for p in known if dimensions is None or p.chosen.dimension in dimensions]
        super().__init__(
            train_files=train_files,
            validation_files=validation_files,
            test_files=test_files,
            dimensions=dimensions,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            max_validation=max_validation,
            seed=seed,
        )
        self.source = PairSource(known, self.train, match=match, seed=seed)
        if len(self.source) < batch_size // 2:
            raise ValueError(
                f"data.batch_size is {batch_size}, which takes {batch_size // 2} pairs, but there are "
                f"{len(self.source)}: pairs need one {match} and two different scores."
            )

    @property
    @override
    def dimensions(self) -> list[str]:
        known = (p.chosen for p in self.source.pairs)
        return sorted({a.dimension for a in (*known, *self.train, *self.validation, *self.test)})

    @property
    @override
    def has_reasoning(self) -> bool:
        return not self.source.pairs and super().has_reasoning

    @override
    def train_dataloader(self) -> DataLoader:
        stream = PreferenceStream(self.source, batch_size=self.batch_size // 2, start=self.position, **self._share())
        return DataLoader(stream, batch_size=None)
