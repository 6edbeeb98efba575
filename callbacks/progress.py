"""A progress bar that says which phase runs."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from typing_extensions import override


class PhaseProgressBar(TQDMProgressBar):
    """Lightning's bar over the run's iterations, headed by the running phase, with the time left.

    Args:
        refresh_rate: batches between redraws.
    """

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if pl_module.clock is not None:
            pl_module.clock.listen(self._show)
        self._set_length(trainer, pl_module)  # a run that resumes in the middle of its epoch does not start the epoch

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self._set_length(trainer, pl_module)

    def _set_length(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The stream of prompts has no end: the run's own limit is the length of the bar."""
        updates = pl_module.updates_per_step
        if trainer.max_steps > 0:
            self.train_progress_bar.total = trainer.max_steps // updates
            self.train_progress_bar.initial = trainer.global_step // updates

    def _show(self, phase: str) -> None:
        self.train_progress_bar.set_description_str(f"{phase:>8}")

    @override
    def get_metrics(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        metrics = super().get_metrics(*args, **kwargs)
        metrics.pop("v_num", None)
        return metrics
