"""What automatically optimised modules share: optimizer, schedule and clipping, all by config."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from typing_extensions import override


class ScheduledOptimizer(LightningModule):
    """Trains every parameter that wants a gradient; the learning rate is stepped after every optimizer step.

    A subclass sets `make_optimizer`, `make_scheduler` (None keeps the rate) and `gradient_clip`, the largest norm.
    """

    make_optimizer: OptimizerCallable
    make_scheduler: LRSchedulerCallable | None
    gradient_clip: float

    @override
    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer([p for p in self.parameters() if p.requires_grad])
        if self.make_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.make_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    @override
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.clip_gradients(optimizer, self.gradient_clip, gradient_clip_algorithm="norm")
