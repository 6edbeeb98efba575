"""One process that is told to stop, in training and after it; two processes are in tests/dist."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from callbacks import Preemption
from callbacks.preemption import EXIT_PREEMPTED

STEPS = 4


class Tell(Callback):
    """Signals to this process in the middle of a step, or when the last one is over."""

    def __init__(self, number: signal.Signals, *, step: int | None) -> None:
        self.number, self.step = number, step

    def on_before_zero_grad(self, trainer: Trainer, *args) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.step is None:
            os.kill(os.getpid(), self.number)


def fit(directory: Path, told: Tell) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        callbacks=[told, Preemption(str(directory))],
        logger=False,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=directory,
    )
    trainer.fit(BoringModel())
    return trainer


@pytest.fixture(autouse=True)
def handlers_are_put_back():
    before = [signal.getsignal(number) for number in Preemption.SIGNALS]
    yield
    assert [signal.getsignal(number) for number in Preemption.SIGNALS] == before


@pytest.mark.parametrize("number", Preemption.SIGNALS)
def test_the_step_is_finished_and_saved(number: signal.Signals, tmp_path) -> None:
    with pytest.raises(SystemExit) as ended:
        fit(tmp_path, Tell(number, step=1))
    assert ended.value.code == EXIT_PREEMPTED
    (saved,) = tmp_path.glob("preempted-step=*.ckpt")
    assert torch.load(saved, weights_only=False)["global_step"] == 2


@pytest.mark.parametrize("number", Preemption.SIGNALS)
def test_a_signal_after_the_last_step_changes_nothing(number: signal.Signals, tmp_path) -> None:
    assert fit(tmp_path, Tell(number, step=None)).global_step == STEPS
    assert not list(tmp_path.glob("preempted-*"))
