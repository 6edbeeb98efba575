"""Annotation files: human scores of images, in JSON Lines.

A line is `{"id", "image", "prompt", "dimension", "score": 1..5, "reasoning"}` with optional `"source"` (for edits) and
`"group"` (samples that compete with each other). Paths are relative to the file.

Shapes: H height, W width.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datamodules.faults import Faults
from datamodules.jsonl import Row, read_rows
from datamodules.pictures import PictureUse, check_pictures, open_picture

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
        pictures: the fields of the row that name `image` and `source`, for messages; empty where no file is known.
    """

    id: int | str
    dimension: str
    prompt: str
    image: Path
    score: float
    reasoning: str
    source: Path | None = None
    group: int | str | None = None
    pictures: Mapping[str, PictureUse] = field(default_factory=dict, compare=False, repr=False)

    def load(self) -> LoadedAnnotation:
        """Read the images."""
        source = None if self.source is None else read_image(self.pictures.get("source", self.source))
        return LoadedAnnotation(
            annotation=self, image=read_image(self.pictures.get("image", self.image)), source=source
        )


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

    def take(self, rows: Sequence[int]) -> AnnotationBatch:
        """Some of the images, in the order asked for."""
        return AnnotationBatch(examples=tuple(self.examples[i] for i in rows))


def read_image(picture: Path | PictureUse) -> Tensor:
    """A picture as uint8 (3, H, W), from a path or the row that names it; see `flow_rl.pictures.read_picture`."""
    image = picture.read() if isinstance(picture, PictureUse) else open_picture(picture)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def uses_of(path: Path, row: Row, keys: Sequence[str]) -> dict[str, PictureUse]:
    """The pictures that a row names, by field."""
    return {
        key: PictureUse(file=str(path), line=row.line, key=key, value=value, path=path.parent / value)
        for key in keys
        if (value := row.record.get(key)) is not None
    }


def read_annotations(path: str | Path) -> list[Annotation]:
    """All annotations of a file.

    Raises:
        DataError: see `annotations_of`.
    """
    faults = Faults()
    found = annotations_of(path, faults)
    faults.check()
    return found


def annotations_of(path: str | Path, faults: Faults) -> list[Annotation]:
    """The annotations of a file that are right.

    Args:
        path: the file.
        faults: takes rows that are wrong (see `read_rows`): a score outside of 1..5, a reasoning that holds a score
            line of its own, or an image that is not there or can't be read.

    Raises:
        DataError: a file that cannot be read at all.
    """
    path = Path(path)

    def complaint(record: dict) -> str | None:
        if not 1 <= record["score"] <= 5:
            return f"'score' is {record['score']}; scores lie on the scale 1..5."
        if _SCORE_LINE.search(record["reasoning"]):
            return "'reasoning' has a line 'Score: ...' of its own; leave it out, it is added from 'score'."
        return None

    rows = read_rows(
        path,
        _FIELDS,
        optional={"source": str, "group": object},
        texts=("prompt",),
        names=("dimension",),
        check=complaint,
        faults=faults,
    )
    pictures = [uses_of(path, row, ("image", "source")) for row in rows]
    check_pictures([use for uses in pictures for use in uses.values()], faults)
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
            pictures=uses,
        )
        for r, uses in zip((row.record for row in rows), pictures, strict=True)
    ]


def read_annotation_files(paths: Sequence[str], dimensions: Sequence[str] | None, name: str) -> list[Annotation]:
    """The annotations of several files, in order.

    Args:
        paths: the files.
        dimensions: keep these alone; None keeps all.
        name: of the setting, for messages.

    Raises:
        ValueError: see `annotations_of`; no file, or one that is named twice; a dimension that no file has.
    """
    if not paths:
        raise ValueError(f"data.{name} is empty: name at least one file.")
    doubled = [path for path, count in Counter(map(os.path.abspath, paths)).items() if count > 1]
    if doubled:
        raise ValueError(f"data.{name} names '{doubled[0]}' twice: its rows would count twice. Name each file once.")
    faults, found = Faults(), []
    for path in paths:
        with faults.collect():
            found += annotations_of(path, faults)
    faults.check()
    known = sorted({a.dimension for a in found})
    for dimension in dimensions or ():
        if dimension not in known:
            raise ValueError(f"data.dimensions names '{dimension}', but data.{name} has {', '.join(known)}.")
    return [a for a in found if dimensions is None or a.dimension in dimensions]
