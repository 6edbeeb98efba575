"""Write what `predict` and `test` draw: a PNG an image and one index."""

from __future__ import annotations

import json
import math
from io import BytesIO
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image
from typing_extensions import override

from callbacks.written_images import WritesImages, bytes_of_images, tables
from flow_rl.files import replace_file, why_unwritable, writing
from flow_rl.models.images import to_uint8
from lightning_modules.image_module import Drawn

#: lists the images of a folder
INDEX = "index.jsonl"


class ImageWriter(BasePredictionWriter, WritesImages):
    """Writes `<id>_<member>.png` and `index.jsonl` with id, member, prompt, category, task and file.

    An edit's file begins with `edit_`: both tasks may use the same ids.

    Args:
        directory: where to write; created if missing. One that holds anything that no `ImageWriter` wrote is refused.
        members: how many images of each prompt; None for all that were drawn.
    """

    def __init__(self, directory: str, members: int | None = None) -> None:
        super().__init__(write_interval="batch")
        if members is not None and members < 1:
            raise ValueError(f"ImageWriter members is {members}; it must be at least 1, or null for all.")
        self.directory, self.members = Path(directory), members

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage in ("test", "predict") and self._writes(trainer):
            refuse_foreign_images(self.directory)

    @override
    def image_bytes(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> dict[Path, int]:
        if stage not in ("test", "predict"):
            return {}
        drawn = getattr(pl_module, "test_members", 1)
        members = drawn if self.members is None else min(self.members, drawn)
        prompts = sum(map(len, tables(trainer, "test")))
        limit = trainer.limit_test_batches if stage == "test" else trainer.limit_predict_batches
        if isinstance(limit, int):
            sizes = [part.eval_batch_size for part in trainer.datamodule.by_task().values()] if prompts else [0]
            prompts = min(prompts, limit * max(sizes))
        else:
            prompts = math.ceil(prompts * limit)
        return {self.directory: bytes_of_images(prompts * members, pl_module)}

    def _writes(self, trainer: Trainer) -> bool:
        return trainer.is_global_zero and not trainer.fast_dev_run

    def _start(self, trainer: Trainer) -> None:
        if not self._writes(trainer):
            return
        with writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            for name in (*listed_images(self.directory), INDEX):  # of the same command, run before
                (self.directory / name).unlink(missing_ok=True)
            (self.directory / INDEX).touch()

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer)

    @override
    def write_on_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, prediction: Drawn, *args: Any, **kwargs: Any
    ) -> None:
        if self._writes(trainer):  # every rank has all of them
            self.write(prediction)

    @override
    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Drawn, *args: Any, **kwargs: Any
    ) -> None:
        if self._writes(trainer):
            self.write(outputs)

    def write(self, drawn: Drawn) -> None:
        """Append a batch to the directory."""
        seen: dict[int, int] = {}
        prompts = drawn.prompts
        with writing(self.directory), (self.directory / INDEX).open("a", encoding="utf-8") as index:
            for i, pixels in enumerate(to_uint8(drawn.images)):
                identifier = prompts.ids[i]
                member = seen[identifier] = seen.get(identifier, -1) + 1
                if self.members is not None and member >= self.members:
                    continue
                name = f"{'' if prompts.task == 't2i' else f'{prompts.task}_'}{identifier}_{member}.png"
                content = BytesIO()
                Image.fromarray(pixels).save(content, "PNG")
                replace_file(self.directory / name, content.getvalue())
                row = {"id": identifier, "member": member, "prompt": prompts.texts[i]}
                row |= {"category": prompts.categories[i], "task": prompts.task, "file": name}
                index.write(json.dumps(row) + "\n")


def listed_images(directory: Path) -> set[str]:
    """The images that a folder's index names."""
    try:
        lines = (directory / INDEX).read_text(encoding="utf-8").splitlines()
        return {Path(str(json.loads(line)["file"])).name for line in lines}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def refuse_foreign_images(directory: Path) -> None:
    """Refuse a folder with pictures that no index lists, or with an index of somebody else's.

    Raises:
        ValueError: naming one of them.
    """
    if why := why_unwritable(directory):
        raise ValueError(f"ImageWriter can't write to '{directory}': {why}. Choose another directory.")
    if not directory.is_dir():
        return
    listed = listed_images(directory)
    foreign = {p.name for p in directory.iterdir() if p.suffix == ".png"} - listed
    index = directory / INDEX
    if index.is_file() and index.stat().st_size and not listed:
        foreign.add(INDEX)
    if foreign:
        raise ValueError(
            f"ImageWriter would mix its images with '{min(foreign)}' in '{directory}', which it did not write. Choose "
            "another directory, or move them away."
        )
