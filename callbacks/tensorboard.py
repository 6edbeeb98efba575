"""The TensorBoard loggers of a run, wherever they stand among its loggers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    """All of them. `trainer.logger` is the first logger only, of whatever kind."""
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def writers(trainer: Trainer) -> list[SummaryWriter]:
    """What writes pictures and texts: on the first rank alone, and not while Lightning tries out the validation."""
    if not trainer.is_global_zero or trainer.sanity_checking:
        return []
    return [logger.experiment for logger in tensorboards(trainer)]
