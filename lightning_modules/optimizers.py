"""Optimizer and schedule by config, and what automatically optimised modules share."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_modules.devices import ComputingModule
from lightning_modules.settings import check_schedule
from strategies.gradients import finish_gradients, finite_everywhere, over_ranks

#: stop a run after so many steps in a row with a loss or gradient that is not finite
MAX_SKIPPED = 5


def settings_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Learning rate, betas and the like of every group, as configured now."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def apply_settings(optimizer: Optimizer, settings: list[dict[str, Any]]) -> None:
    """Put back what `settings_of` gave: a checkpoint brings its own, and what the user asks for now must win."""
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)


class ConfiguredOptimizer(ComputingModule):
    """Optimizer and learning-rate schedule by config; the schedule is stepped after every step of the optimizer.

    A subclass sets `make_optimizer` and `make_scheduler` (None keeps the rate), and says what is trained.
    """

    make_optimizer: OptimizerCallable
    make_scheduler: LRSchedulerCallable | None

    def trained(self) -> list[nn.Parameter]:
        """The weights that the optimizer holds."""
        return [p for p in self.parameters() if p.requires_grad]

    @override
    def setup(self, stage: str) -> None:
        """Refuse a schedule that does not fit the run, before a model loads."""
        if stage == "fit" and self.make_scheduler is not None:
            check_schedule(self.make_optimizer, self.make_scheduler, self.trainer.max_steps)

    @override
    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.trained())
        self._settings = settings_of(optimizer)
        if self.make_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.make_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    @override
    def on_train_start(self) -> None:
        if self.make_scheduler is None:  # a schedule goes on with what it has in its own state
            apply_settings(self.optimizers().optimizer, self._settings)


class ScheduledOptimizer(ConfiguredOptimizer):
    """Trains every parameter that wants a gradient, by automatic optimization.

    A step whose loss or gradient is not finite on any rank is left out on all of them; `MAX_SKIPPED` in a row end the
    run. A subclass sets `gradient_clip`, the largest norm, and calls `note_loss` in its training step.
    """

    gradient_clip: float
    #: steps in a row that were left out
    skipped = 0
    #: the losses since the last optimizer step are finite on this rank
    _finite = True

    def note_loss(self, loss: Tensor) -> None:
        """Remember whether this rank's loss is finite until the ranks vote, before the optimizer steps."""
        self._finite = self._finite and bool(torch.isfinite(loss.detach()).all())

    def log_means(self, values: dict[str, Tensor], *, batch_size: int) -> None:
        """Log scalars as their means over the ranks, in one message; `loss` is shown in the progress bar."""
        means = over_ranks({name: float(value) for name, value in values.items()})
        self.log("loss", means.pop("loss"), prog_bar=True, batch_size=batch_size)
        self.log_dict(means, batch_size=batch_size)

    @override
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        norm = finish_gradients(self.trained(), self.gradient_clip)
        finite, self._finite = self._finite, True
        if finite_everywhere(norm, torch.tensor(0.0 if finite else float("nan"))):
            self.skipped = 0
        else:
            optimizer.zero_grad(set_to_none=True)  # an optimizer leaves alone what has no gradient
            self.skipped += 1
        self.log("skipped_in_a_row", float(self.skipped))
        if self.skipped >= MAX_SKIPPED:
            raise RuntimeError(
                f"Stopped at step {self.global_step}: {self.skipped} steps in a row had a loss or gradient that is not "
                "finite. Lower the learning rate, or compute in float32."
            )

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["skipped"] = self.skipped

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.skipped = checkpoint["skipped"]
