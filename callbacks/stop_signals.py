"""SIGTERM is obeyed in every stage, also while the run waits for a service that does not answer."""

from __future__ import annotations

import signal
import threading
from typing import Any

from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from flow_rl import stop_signal


class StopSignals(Callback):
    """Notes SIGTERM for whoever waits, and passes it on. The command line adds it to every run.

    In `fit` the running iteration ends first, and Lightning or `callbacks.Preemption` stops the run after it. A wait
    for scores is given up after ten seconds. `validate`, `test` and `predict` end before their next batch.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        stop_signal.forget()

    def _listen(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may set handlers
        # Lightning sets its own right before each stage, and in its teardown puts back what was there before.
        before = signal.getsignal(signal.SIGTERM)
        if getattr(before, "notes_stops", False):
            return

        def handle(number: int, frame: Any) -> None:
            stop_signal.note()
            if callable(before):
                before(number, frame)

        handle.notes_stops = True  # type: ignore[attr-defined]
        signal.signal(signal.SIGTERM, handle)

    on_sanity_check_start = on_train_start = on_validation_start = on_test_start = on_predict_start = _listen

    @override
    def on_validation_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if stop_signal.asked() and trainer.state.fn != "fit":
            raise stop_signal.StopAsked

    @override
    def on_test_batch_start(self, *args: Any, **kwargs: Any) -> None:
        if stop_signal.asked():
            raise stop_signal.StopAsked

    on_predict_batch_start = on_test_batch_start
