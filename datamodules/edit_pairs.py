"""Edit tasks from JSON Lines files `{"id", "instruction", "source", "category"}`, optionally with a `"target"`.

Shapes: P edits, H height, W width.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from typing_extensions import override

from datamodules.faults import Faults
from datamodules.jsonl import Row, read_rows
from datamodules.pictures import PictureChanged, PictureUse, check_pictures, open_picture
from datamodules.prompts import PromptDataModule
from flow_rl.batches import Prompts, PromptTable
from flow_rl.models.images import from_uint8

#: how far a source's height / width may be from the wanted one, as a factor
ASPECT_TOLERANCE = 1.02


@dataclass(frozen=True, kw_only=True)
class EditTable(PromptTable):
    """Edits by row; source images are read from disk a batch at a time.

    Attributes:
        ids: stable integers that key the noise and the groups, length P.
        instructions: what to do, length P.
        categories: semantic category of each, length P.
        pictures: the source images with the rows that name them, length P.
        image_size: sources are scaled to so many pixels a side.
    """

    ids: tuple[int, ...]
    instructions: tuple[str, ...]
    categories: tuple[str, ...]
    pictures: tuple[PictureUse, ...]
    image_size: int

    @property
    def sources(self) -> tuple[Path, ...]:
        """Paths of the source images, length P."""
        return tuple(picture.path for picture in self.pictures)

    @override
    def select(self, index: list[int]) -> Prompts:
        return Prompts(
            ids=tuple(self.ids[i] for i in index),
            texts=tuple(self.instructions[i] for i in index),
            categories=tuple(self.categories[i] for i in index),
            sources=torch.cat([self._source(self.pictures[i]) for i in index]),
        )

    def _source(self, use: PictureUse) -> torch.Tensor:
        picture = use.read()
        if complaint := why_distorted(use, picture.size):
            raise PictureChanged(f"{use.where}: {use.key}: {complaint} It was square when the run started.")
        return as_square(picture, self.image_size)

    @override
    def subset(self, index: list[int]) -> EditTable:
        return EditTable(
            ids=tuple(self.ids[i] for i in index),
            instructions=tuple(self.instructions[i] for i in index),
            categories=tuple(self.categories[i] for i in index),
            pictures=tuple(self.pictures[i] for i in index),
            image_size=self.image_size,
        )


def why_distorted(use: PictureUse, size: tuple[int, int]) -> str | None:
    """The complaint about a picture that is not square: scaling would distort it."""
    width, height = size
    if max(width / height, height / width) <= ASPECT_TOLERANCE:
        return None
    return f"the image '{use.path}' is {width} x {height}; {use.key}s must be square here: crop it."


def as_square(picture: Image.Image, size: int) -> torch.Tensor:
    """A square picture scaled to `size` pixels a side: float32 in [0, 1], shape (1, 3, size, size)."""
    if picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.LANCZOS)
    return from_uint8(np.array(picture)[None])  # a copy: PIL lends its own memory read-only


def read_image(path: Path, size: int) -> torch.Tensor:
    """One square image, float32 in [0, 1], shape (1, 3, size, size).

    Raises:
        ValueError: a file that is no image, or one that is not square: scaling would distort it.
    """
    picture = open_picture(path)
    width, height = picture.size
    if max(width / height, height / width) > ASPECT_TOLERANCE:
        raise ValueError(f"The image '{path}' is {width} x {height}; sources must be square here: crop it.")
    return as_square(picture, size)


def read_edits(path: str, image_size: int) -> EditTable:
    """All edits of a file; paths in it are relative to it.

    Raises:
        DataError: see `read_rows`; a source or target that is not there, can't be read or is not square.
    """
    faults = Faults()
    table = edits_of(edit_rows(path, faults), path, image_size)
    faults.check()
    return table


def edit_rows(path: str, faults: Faults) -> list[Row]:
    """The rows of an edit file, their pictures decoded once; see `read_edits`."""
    rows = read_rows(
        path,
        {"id": int, "instruction": str, "source": str, "category": str},
        optional={"target": str},
        texts=("instruction",),
        names=("category",),
        faults=faults,
    )
    uses = [_use(path, row, key) for row in rows for key in ("source", "target") if key in row.record]
    check_pictures(uses, faults, fits=why_distorted)
    return rows


def edits_of(rows: Sequence[Row], path: str, image_size: int) -> EditTable:
    """A table of rows that were checked."""
    records = [row.record for row in rows]
    return EditTable(
        ids=tuple(r["id"] for r in records),
        instructions=tuple(r["instruction"] for r in records),
        categories=tuple(r["category"] for r in records),
        pictures=tuple(_use(path, row, "source") for row in rows),
        image_size=image_size,
    )


def _use(path: str, row: Row, key: str) -> PictureUse:
    value = row.record[key]
    return PictureUse(file=str(path), line=row.line, key=key, value=value, path=Path(path).parent / value)


class EditPairDataModule(PromptDataModule):
    """Edit files for `fit`, `validate`, `test` and `predict`; the other settings are those of `PromptDataModule`.

    Args:
        image_size: of the model, in pixels; sources are scaled to it.
        **settings: see `PromptDataModule`, whose prompts are edits here.
    """

    task = "edit"

    def __init__(self, image_size: int, **settings: Any) -> None:
        if image_size < 1:
            raise ValueError(f"data.image_size is {image_size}; it must be the model's image size in pixels.")
        self.image_size = image_size
        super().__init__(**settings)

    @override
    def rows(self, path: str, faults: Faults) -> list[Row]:
        return edit_rows(path, faults)

    @override
    def table(self, rows: Sequence[Row], path: str) -> PromptTable:
        return edits_of(rows, path, self.image_size)

    @override
    def key_of(self, row: Row, path: str) -> tuple[str, ...]:
        source = os.path.abspath(Path(path).parent / row.record["source"])
        return (*super().key_of(row, path), source)

    @override
    def text_of(self, row: Row) -> str:
        return row.record["instruction"]
