"""What a command line has built, as the doctor reads it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import HackingMonitor, UpdateProbe, WeightEMA
from cli.named_callbacks import built_callbacks
from flow_rl.planning.setup import Setup


def setup_of(cli: Any, stage: str) -> Setup:
    """What a CLI has built for a subcommand."""
    config, callbacks = cli.config[cli.subcommand], list(built_callbacks(cli).values())
    trainer = config.trainer.as_dict() if hasattr(config.trainer, "as_dict") else dict(config.trainer)
    return Setup(
        model=cli.model,
        data=cli.datamodule,
        trainer=trainer,
        callbacks=callbacks,
        ema=any(isinstance(callback, WeightEMA) for callback in callbacks),
        probes=[callback for callback in callbacks if isinstance(callback, UpdateProbe)],
        monitors=[callback for callback in callbacks if isinstance(callback, HackingMonitor)],
        checkpoints=[callback for callback in callbacks if isinstance(callback, ModelCheckpoint)],
        run_directory=f"{config.run.dir}/{config.run.name}",
        stage=stage,
    )
