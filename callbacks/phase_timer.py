"""Seconds of each phase of a step, images a second and the share of the hardware's peak, in the logs."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from flow_rl.models import ImageModel


class PhaseTimer(Callback):
    """Logs where the time of a step goes, for modules that keep a `PhaseClock`, which says whose time it is.

    Logs `time/<phase>_s`, `time/step_s` and `time/images_per_s`; and, where the module's generator counts its
    floating-point operations, `time/tflops` and `time/<phase>_tflops`: 10^12 operations a second that the model's
    matrix products ask for, forward and backward, whatever was recomputed to save memory. Text encoder, image decoder
    and rewards are not counted, though their time is. Everything is of this process alone.

    Args:
        peak_tflops: what one device can do at the precision in use; with it, `time/utilisation` is logged too.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        if peak_tflops is not None and not peak_tflops > 0:
            raise ValueError(f"PhaseTimer peak_tflops is {peak_tflops}; it must be above 0, or null.")
        self.peak_tflops = peak_tflops
        self._start = 0.0
        self._flops: Counter[str] = Counter()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.clock.follow(trainer.strategy.root_device)

        def count(flops: float) -> None:
            self._flops[pl_module.clock.current] += flops

        self._listen(pl_module, count)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen(pl_module, None)

    @staticmethod
    def _listen(pl_module: LightningModule, listener: Any) -> None:
        for module in pl_module.modules():
            if isinstance(module, ImageModel):
                module.on_flops = listener

    @override
    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()
        self._flops.clear()

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        seconds, images = pl_module.clock.drain()  # waits for the device, whose work belongs to the step
        total = time.perf_counter() - self._start
        values = {f"time/{phase}_s": spent for phase, spent in seconds.items()}
        values |= {"time/step_s": total, "time/images_per_s": images / total}
        if self._flops:
            rates = {phase: self._flops[phase] / 1e12 / spent for phase, spent in seconds.items() if self._flops[phase]}
            values |= {f"time/{phase}_tflops": rate for phase, rate in rates.items()}
            values["time/tflops"] = self._flops.total() / 1e12 / total
            if self.peak_tflops is not None:
                values["time/utilisation"] = values["time/tflops"] / self.peak_tflops
        pl_module.log_dict(values, batch_size=1)
