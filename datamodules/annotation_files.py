"""Annotation files: human scores of images, in JSON Lines.

A line is `{"id", "image", "prompt", "dimension", "score": 1..5, "reasoning"}` with optional `"source"` (for edits) and
`"group"` (samples that compete with each other). Paths are relative to the file.

Shapes: H height, W width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datamodules.jsonl import read_records
from datamodules.pictures import open_picture

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

    def take(self, rows: Sequence[int]) -> AnnotationBatch:
        """Some of the images, in the order asked for."""
        return AnnotationBatch(examples=tuple(self.examples[i] for i in rows))


def read_image(path: Path) -> Tensor:
    """A picture as uint8 (3, H, W); see `open_picture`."""
    return torch.from_numpy(np.array(open_picture(path))).permute(2, 0, 1).contiguous()


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
