"""Write the trained generator, in the layout plain diffusers loads, when training ends."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from callbacks.ema import WeightEMA


class ExportModel(Callback):
    """Exports the EMA weights if there is a `WeightEMA`, the present weights otherwise.

    Args:
        directory: where to write; an earlier export there is replaced once the new one is complete.
    """

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        averages = [c.shadow for c in trainer.callbacks if isinstance(c, WeightEMA) and c.shadow is not None]
        partial = self.directory.with_name(self.directory.name + ".partial")
        if trainer.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)
        with averages[0].applied() if averages else nullcontext():
            pl_module.export(partial)  # on every rank: sharded weights are gathered, the first rank writes
        if trainer.is_global_zero:
            shutil.rmtree(self.directory, ignore_errors=True)
            partial.rename(self.directory)
