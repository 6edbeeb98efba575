"""What a command line has built, as the doctor reads it."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace
from lightning import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint

from cli.named_callbacks import built_callbacks
from flow_rl.batches import PromptData
from flow_rl.planning.demands import Demanding
from flow_rl.planning.setup import Setup
from flow_rl.planning.stage import Profile
from lightning_modules.base import TrainedModule


class UnknownStage:
    """A module of somebody else's, of which only what every LightningModule has is known.

    Args:
        module: as built from the config.
    """

    def __init__(self, module: LightningModule) -> None:
        self.module = module

    def profile(self) -> Profile:
        """See `Stage.profile`."""
        return Profile(manual=not self.module.automatic_optimization)

    def workload(self, data: PromptData | None, *, ranks: int) -> None:
        """See `Stage.workload`: not counted."""


def setup_of(cli: Any, stage: str) -> Setup:
    """What a CLI has built for a subcommand."""
    config, named = cli.config[cli.subcommand], built_callbacks(cli)
    callbacks = list(named.values())
    trainer = config.trainer.as_dict() if isinstance(config.trainer, Namespace) else dict(config.trainer)
    return Setup(
        model=cli.model if isinstance(cli.model, TrainedModule) else UnknownStage(cli.model),
        data=cli.datamodule,
        trainer=trainer,
        demands=[callback.demands() for callback in callbacks if isinstance(callback, Demanding)],
        checkpoints=[callback for callback in callbacks if isinstance(callback, ModelCheckpoint)],
        callbacks=named,
        run_directory=f"{config.run.dir}/{config.run.name}",
        stage=stage,
    )
