"""Seconds of each phase of a step, and images a second, in the logs."""

from __future__ import annotations

import time
from typing import Any

from lightning import Callback, LightningModule, Trainer
from typing_extensions import override


class PhaseTimer(Callback):
    """Logs `time/<phase>_s`, `time/step_s` and `time/images_per_s` of modules that keep a `PhaseClock`."""

    def __init__(self) -> None:
        self._start = 0.0

    @override
    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        total = time.perf_counter() - self._start
        seconds, images = pl_module.clock.drain()
        values = {f"time/{phase}_s": spent for phase, spent in seconds.items()}
        values |= {"time/step_s": total, "time/images_per_s": images / total}
        pl_module.log_dict(values, batch_size=1)
