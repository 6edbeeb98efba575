"""Human scores of images, for training and checking reward models, from JSON Lines.

A line is `{"id", "image", "prompt", "dimension", "score": 1..5, "reasoning"}` with optional `"source"` (for edits) and
`"group"` (samples that compete with each other). Paths are relative to the file.

Shapes: H height, W width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from datamodules.jsonl import read_records
from datamodules.stream import batch_indices

_FIELDS: dict[str, type] = {
    "id": object, "image": str, "prompt": str, "dimension": str, "score": float, "reasoning": str,
}  # fmt: skip
_SCORE_LINE = re.compile(r"(?:^|\s)Score:[ \t]?[1-5]")


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """One image with what is known of it; images stay on disk until they are used.

    Attributes:
        id: unique in its file.
        dimension: what was judged, the name of a rubric.
        prompt: the text the image was made from; for edits, the instruction.
        image: path.
        score: y in [1, 5]; NaN where none is known (a member of a preference pair).
        reasoning: why, in the rubric's terms, without the score line; "" where there is none.
        source: for edits, path of the source image.
        group: samples of one group compete with each other; None if the file does not say.
    """

    id: int | str
    dimension: str
    prompt: str
    image: Path
    score: float
    reasoning: str
    source: Path | None = None
    group: int | str | None = None

    def load(self) -> LoadedAnnotation:
        """Read the images."""
        source = None if self.source is None else read_image(self.source)
        return LoadedAnnotation(annotation=self, image=read_image(self.image), source=source)


@dataclass(frozen=True, kw_only=True)
class LoadedAnnotation:
    """An annotation with its images in memory.

    Attributes:
        annotation: the record.
        image: uint8, shape (3, H, W).
        source: for edits, uint8, shape (3, H', W').
    """

    annotation: Annotation
    image: Tensor
    source: Tensor | None


@dataclass(frozen=True, kw_only=True)
class AnnotationBatch:
    """What a step on scored images gets.

    Attributes:
        examples: one an image.
    """

    examples: tuple[LoadedAnnotation, ...]

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def scores(self) -> Tensor:
        """y, float32 (N,)."""
        return torch.tensor([e.annotation.score for e in self.examples], dtype=torch.float32)


def read_image(path: Path) -> Tensor:
    """A picture as uint8 (3, H, W); transparent parts are shown on white."""
    with Image.open(path) as picture:
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            layer = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()


def missing_image(record: dict, directory: Path, keys: Sequence[str]) -> str | None:
    """The complaint about the first of a record's images that is not there."""
    for key in keys:
        if key in record and not (directory / record[key]).is_file():
            return f"{key} '{record[key]}' is not there (paths are relative to '{directory}')."
    return None


def read_annotations(path: str | Path) -> list[Annotation]:
    """All annotations of a file.

    Raises:
        ValueError: see `read_records`; a score outside of 1..5, a reasoning that holds a score line of its own, or an
            image that is not there. The message names file and line.
    """
    path = Path(path)

    def complaint(record: dict) -> str | None:
        if not 1 <= record["score"] <= 5:
            return f"'score' is {record['score']}; scores lie on the scale 1..5."
        if _SCORE_LINE.search(record["reasoning"]):
            return "'reasoning' has a line 'Score: ...' of its own; leave it out, it is added from 'score'."
        return missing_image(record, path.parent, ("image", "source"))

    records = read_records(path, _FIELDS, optional={"source": str, "group": object}, check=complaint)
    return [
        Annotation(
            id=r["id"],
            dimension=r["dimension"],
            prompt=r["prompt"],
            image=path.parent / r["image"],
            score=float(r["score"]),
            reasoning=r["reasoning"].strip(),
            source=path.parent / r["source"] if "source" in r else None,
            group=r.get("group"),
        )
        for r in records
    ]


def read_annotation_files(paths: Sequence[str], dimensions: Sequence[str] | None, name: str) -> list[Annotation]:
    """The annotations of several files, in order.

    Args:
        paths: the files.
        dimensions: keep these alone; None keeps all.
        name: of the setting, for messages.

    Raises:
        ValueError: see `read_annotations`; no file; a dimension that no file has.
    """
    if not paths:
        raise ValueError(f"data.{name} is empty: name at least one file.")
    found = [annotation for path in paths for annotation in read_annotations(path)]
    known = sorted({a.dimension for a in found})
    for dimension in dimensions or ():
        if dimension not in known:
            raise ValueError(f"data.dimensions names '{dimension}', but data.{name} has {', '.join(known)}.")
    return [a for a in found if dimensions is None or a.dimension in dimensions]


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


class AnnotationDataModule(LightningDataModule):
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
        self.train: list[Annotation] = []
        if train_files or self.needs_annotations:
            self.train = read_annotation_files(train_files, dimensions, "train_files")
        self.validation = spread(
            read_annotation_files(validation_files, dimensions, "validation_files"), max_validation
        )
        self.test = read_annotation_files(test_files or validation_files, dimensions, "test_files")
        if self.needs_annotations and batch_size > len(self.train):
            raise ValueError(f"data.batch_size is {batch_size}, but data.train_files have {len(self.train)} images.")
        self._position = 0

    @property
    def dimensions(self) -> list[str]:
        """Every dimension that occurs."""
        return sorted({a.dimension for a in (*self.train, *self.validation, *self.test)})

    @property
    def has_reasoning(self) -> bool:
        """Whether every training example comes with a reasoning."""
        return all(a.reasoning for a in self.train)

    @override
    def train_dataloader(self) -> DataLoader:
        stream = AnnotationStream(
            self.train, batch_size=self.batch_size, seed=self.seed, start=self._position, **self._share()
        )
        return DataLoader(stream, batch_size=None)

    @override
    def val_dataloader(self) -> DataLoader:
        return self._fixed(self.validation)

    @override
    def test_dataloader(self) -> DataLoader:
        return self._fixed(self.test)

    def _fixed(self, annotations: Sequence[Annotation]) -> DataLoader:
        return DataLoader(
            FixedAnnotations(annotations, batch_size=self.eval_batch_size, **self._share()), batch_size=None
        )

    def _share(self) -> dict[str, int]:
        trainer = self.trainer
        return {
            "rank": 0 if trainer is None else trainer.global_rank,
            "world_size": 1 if trainer is None else trainer.world_size,
        }

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"position": self.trainer.fit_loop.epoch_loop.batch_progress.total.processed}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._position = state_dict["position"]


def spread(annotations: list[Annotation], most: int | None) -> list[Annotation]:
    """At most `most` annotations, evenly spaced over the list, so that every file and dimension keeps its share."""
    if most is None or most >= len(annotations):
        return annotations
    if most < 1:
        raise ValueError(f"data.max_validation is {most}; it must be at least 1, or null for all.")
    return [annotations[i * len(annotations) // most] for i in range(most)]
