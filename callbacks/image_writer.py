"""Write what `predict` draws: a PNG an image and one index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image
from typing_extensions import override

from lightning_modules.evaluation_steps import Drawn
from models.images import to_uint8


class ImageWriter(BasePredictionWriter):
    """Writes `<id>_<member>.png` and `index.jsonl` with id, member, prompt, category and file.

    Args:
        directory: where to write; created if missing.
    """

    def __init__(self, directory: str) -> None:
        super().__init__(write_interval="batch")
        self.directory = Path(directory)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "index.jsonl").write_text("", encoding="utf-8")

    @override
    def write_on_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, prediction: Drawn, *args: Any, **kwargs: Any
    ) -> None:
        seen: dict[int, int] = {}
        prompts = prediction.prompts
        with (self.directory / "index.jsonl").open("a", encoding="utf-8") as index:
            for i, pixels in enumerate(to_uint8(prediction.images)):
                identifier = prompts.ids[i]
                member = seen[identifier] = seen.get(identifier, -1) + 1
                name = f"{identifier}_{member}.png"
                Image.fromarray(pixels).save(self.directory / name)
                row = {"id": identifier, "member": member, "prompt": prompts.texts[i]}
                index.write(json.dumps(row | {"category": prompts.categories[i], "file": name}) + "\n")
