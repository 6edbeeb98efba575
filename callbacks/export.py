"""Write the trained generator, in the layout plain diffusers loads, when training ends."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from safetensors import SafetensorError
from typing_extensions import override

from flow_rl.errors import CannotWrite
from flow_rl.files import reason, refuse_foreign_folder, replacing
from flow_rl.models.adapters import save_adapter
from flow_rl.planning.demands import Demanding, Demands


class _Export(Callback, Demanding):
    """Writes a folder at the end of a training, and refuses at its start one that it must not replace.

    Args:
        directory: where to write. Only a folder that an export of this project wrote is replaced, once the new one is
            complete; any other is refused before training.
    """

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)

    @override
    def demands(self) -> Demands:
        return Demands(replaces=(self.directory,))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not trainer.fast_dev_run and trainer.is_global_zero:
            refuse_foreign_folder(self.directory)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        # On every rank: sharded weights are gathered, and the first rank writes.
        with replacing(self.directory, writes=trainer.is_global_zero) as partial, averaged(pl_module), _named(partial):
            self.write(pl_module, partial)

    @abstractmethod
    def write(self, pl_module: LightningModule, path: Path) -> None:
        """Write into an empty folder; every rank calls it."""


class ExportModel(_Export):
    """Exports the EMA weights if there is a `WeightEMA`, the present weights otherwise.

    Args:
        directory: where to write. Only a folder that an export of this project wrote is replaced, once the new one is
            complete; any other is refused before training.
    """

    @override
    def write(self, pl_module: LightningModule, path: Path) -> None:
        pl_module.export(path)


class ExportAdapter(_Export):
    """Writes the LoRA of the module's transformer in diffusers' layout; its EMA if there is a `WeightEMA`.

    Args:
        directory: see `ExportModel`.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if getattr(pl_module, "lora", None) is None:
            raise ValueError(
                "callbacks.ExportAdapter has no adapter to write: model.lora is not set. Set it, or use "
                "callbacks.ExportModel, which writes all weights."
            )
        super().setup(trainer, pl_module, stage)

    @override
    def write(self, pl_module: LightningModule, path: Path) -> None:
        save_adapter(pl_module.model.transformer, path)


def averaged(pl_module: LightningModule) -> AbstractContextManager[None]:
    """Inside, the module computes with the average of its weights, if it has one."""
    average = getattr(pl_module, "average", None)
    return nullcontext() if average is None else average.applied()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Safetensors has an error of its own for what the disk refuses."""
    try:
        yield
    except SafetensorError as error:
        raise CannotWrite(f"Can't write the export in '{path.parent}': {reason(error)}. Free space there.") from error
