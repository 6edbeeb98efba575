"""Write the trained generator, in the layout plain diffusers loads, when training ends."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from callbacks.ema import WeightEMA
from flow_rl.models.adapters import save_adapter


class ExportModel(Callback):
    """Exports the EMA weights if there is a `WeightEMA`, the present weights otherwise.

    Args:
        directory: where to write; an earlier export there is replaced once the new one is complete.
    """

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with replacing(self.directory, writes=trainer.is_global_zero) as partial, averaged(trainer):
            pl_module.export(partial)  # on every rank: sharded weights are gathered, the first rank writes


def averaged(trainer: Trainer) -> AbstractContextManager[None]:
    """Inside, the module computes with its EMA, if there is a `WeightEMA`."""
    shadows = [c.shadow for c in trainer.callbacks if isinstance(c, WeightEMA) and c.shadow is not None]
    return shadows[0].applied() if shadows else nullcontext()


@contextmanager
def replacing(directory: Path, *, writes: bool) -> Iterator[Path]:
    """A directory to write into, which takes the place of `directory` once the block is through.

    Args:
        directory: the final one; what is there stays until then.
        writes: whether this process is the one that writes; the others are only told the name.
    """
    partial = directory.with_name(directory.name + ".partial")
    if writes:
        shutil.rmtree(partial, ignore_errors=True)
    yield partial
    if writes:
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)


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
