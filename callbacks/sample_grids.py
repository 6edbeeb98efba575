"""Image grids of the same prompts from the same noise, as training goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from callbacks.tensorboard import tensorboards, writers
from callbacks.written_images import WritesImages, bytes_of_images, tables, validations
from flow_rl.batches import labels
from flow_rl.evaluation.grids import image_grid
from lightning_modules.image_module import Drawn


class SampleGrids(Callback, WritesImages):
    """Puts a grid a category into TensorBoard at every validation, and the prompts as text once.

    It shows what the validation drew anyway, so it costs no forward of its own.

    Args:
        per_category: images of each category.
    """

    def __init__(self, per_category: int = 8) -> None:
        if per_category < 1:
            raise ValueError(f"SampleGrids per_category is {per_category}; it must be at least 1.")
        self.per_category = per_category
        self._images: dict[str, list[Tensor]] = {}
        self._texts: dict[str, list[str]] = {}
        self._described = False

    @override
    def image_bytes(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> dict[Path, int]:
        if stage != "fit":
            return {}
        shown = 0
        for part in tables(trainer, "validation"):
            counts = Counter(part.categories).values()
            shown += sum(min(self.per_category, count) for count in counts)
        shown *= len(getattr(pl_module, "val_guidances", (1.0,)))
        count = shown * validations(trainer, getattr(pl_module, "updates_per_step", 1))
        return {Path(logger.log_dir): bytes_of_images(count, pl_module) for logger in tensorboards(trainer)}

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._images, self._texts = {}, {}

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Mapping[str, Drawn], *args: Any, **kwargs: Any
    ) -> None:
        for label, drawn in outputs.items():
            prompts = drawn.prompts
            names = labels(prompts.categories, [prompts.task] * len(prompts))
            for image, text, name in zip(drawn.images, prompts.texts, names, strict=True):
                kept = self._images.setdefault(f"{label}{name}", [])
                if len(kept) < self.per_category:
                    kept.append(image.cpu())
                    self._texts.setdefault(f"{label}{name}", []).append(text)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = writers(trainer)
        for writer, (category, images) in product(found, sorted(self._images.items())):
            grid = image_grid(torch.stack(images), columns=min(8, len(images)))
            writer.add_image(f"samples/{category}", grid, trainer.global_step)
            if not self._described:
                listing = "\n".join(f"{i + 1}. {text}" for i, text in enumerate(self._texts[category]))
                writer.add_text(f"samples/{category}", listing, trainer.global_step)
        self._described = self._described or bool(found)
