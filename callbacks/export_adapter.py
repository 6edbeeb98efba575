"""Write the trained adapter alone, when training ends: a teacher of a few megabytes."""

from __future__ import annotations

from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from callbacks.export import averaged, replacing
from models.adapters import save_adapter


class ExportAdapter(Callback):
    """Writes the LoRA of the module's transformer in diffusers' layout; its EMA if there is a `WeightEMA`.

    Args:
        directory: where to write; an earlier adapter there is replaced once the new one is complete.
    """

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if getattr(pl_module, "lora", None) is None:
            raise ValueError(
                "callbacks.ExportAdapter has no adapter to write: model.lora is not set. Set it, or use "
                "callbacks.ExportModel, which writes all weights."
            )

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with replacing(self.directory, writes=trainer.is_global_zero) as partial, averaged(trainer):
            save_adapter(pl_module.model.transformer, partial)
