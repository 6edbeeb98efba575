"""Write what `predict` and `test` draw: a PNG an image and one index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image
from typing_extensions import override

from flow_rl.models.images import to_uint8
from lightning_modules.image_module import Drawn


class ImageWriter(BasePredictionWriter):
    """Writes `<id>_<member>.png` and `index.jsonl` with id, member, prompt, category, task and file.

    An edit's file begins with `edit_`: both tasks may use the same ids.

    Args:
        directory: where to write; created if missing.
        members: how many images of each prompt; None for all that were drawn.
    """

    def __init__(self, directory: str, members: int | None = None) -> None:
        super().__init__(write_interval="batch")
        if members is not None and members < 1:
            raise ValueError(f"ImageWriter members is {members}; it must be at least 1, or null for all.")
        self.directory, self.members = Path(directory), members

    def _start(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            self.directory.mkdir(parents=True, exist_ok=True)
            (self.directory / "index.jsonl").write_text("", encoding="utf-8")

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
        if trainer.is_global_zero:  # every rank has all of them
            self.write(prediction)

    @override
    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Drawn, *args: Any, **kwargs: Any
    ) -> None:
        if trainer.is_global_zero:
            self.write(outputs)

    def write(self, drawn: Drawn) -> None:
        """Append a batch to the directory."""
        seen: dict[int, int] = {}
        prompts = drawn.prompts
        with (self.directory / "index.jsonl").open("a", encoding="utf-8") as index:
            for i, pixels in enumerate(to_uint8(drawn.images)):
                identifier = prompts.ids[i]
                member = seen[identifier] = seen.get(identifier, -1) + 1
                if self.members is not None and member >= self.members:
                    continue
                name = f"{'' if prompts.task == 't2i' else f'{prompts.task}_'}{identifier}_{member}.png"
                Image.fromarray(pixels).save(self.directory / name)
                row = {"id": identifier, "member": member, "prompt": prompts.texts[i]}
                row |= {"category": prompts.categories[i], "task": prompts.task, "file": name}
                index.write(json.dumps(row) + "\n")
