"""Edit tasks from JSON Lines files `{"id", "instruction", "source", "category"}`, optionally with a `"target"`.

Shapes: P edits, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from typing_extensions import override

from datamodules.jsonl import read_records
from datamodules.pictures import open_picture
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
        sources: paths of the source images, length P.
        image_size: sources are scaled to so many pixels a side.
    """

    ids: tuple[int, ...]
    instructions: tuple[str, ...]
    categories: tuple[str, ...]
    sources: tuple[Path, ...]
    image_size: int

    @override
    def select(self, index: list[int]) -> Prompts:
        return Prompts(
            ids=tuple(self.ids[i] for i in index),
            texts=tuple(self.instructions[i] for i in index),
            categories=tuple(self.categories[i] for i in index),
            sources=torch.cat([read_image(self.sources[i], self.image_size) for i in index]),
        )

    @override
    def subset(self, index: list[int]) -> EditTable:
        return EditTable(
            ids=tuple(self.ids[i] for i in index),
            instructions=tuple(self.instructions[i] for i in index),
            categories=tuple(self.categories[i] for i in index),
            sources=tuple(self.sources[i] for i in index),
            image_size=self.image_size,
        )


def read_image(path: Path, size: int) -> torch.Tensor:
    """One square image, float32 in [0, 1], shape (1, 3, size, size).

    Raises:
        ValueError: a file that is no image, or one that is not square: scaling would distort it.
    """
    picture = open_picture(path)
    width, height = picture.size
    if max(width / height, height / width) > ASPECT_TOLERANCE:
        raise ValueError(
            f"The image '{path}' is {width} x {height}; sources must be square here (crop it): scaling it to "
            f"{size} x {size} would distort it."
        )
    if picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.LANCZOS)
    return from_uint8(np.array(picture)[None])  # a copy: PIL lends its own memory read-only


def read_edits(path: str, image_size: int) -> EditTable:
    """All edits of a file; paths in it are relative to it.

    Raises:
        ValueError: see `read_records`; a blank instruction; a source or target that is not there.
    """
    fields = {"id": int, "instruction": str, "source": str, "category": str}
    records = read_records(path, fields, optional={"target": str})
    directory = Path(path).parent
    for record in records:
        if not record["instruction"].strip():
            raise ValueError(f"'{path}': the instruction with id {record['id']} is blank.")
        for key in ("source", "target"):
            if key in record and not (directory / record[key]).is_file():
                raise ValueError(
                    f"'{path}': the {key} of id {record['id']} is '{record[key]}', and there is no file "
                    f"'{directory / record[key]}'. Paths are relative to the edit file."
                )
    return EditTable(
        ids=tuple(r["id"] for r in records),
        instructions=tuple(r["instruction"] for r in records),
        categories=tuple(r["category"] for r in records),
        sources=tuple(directory / r["source"] for r in records),
        image_size=image_size,
    )


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
    def read(self, path: str) -> PromptTable:
        return read_edits(path, self.image_size)
