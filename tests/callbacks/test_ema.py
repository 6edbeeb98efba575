"""The moving average of the weights: its decay, its warm-up, and what a resumed run goes on with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.training_utils import EMAModel
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from callbacks import WeightEMA


class History(Callback):
    """The weights after every step."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: BoringModel, *args: object) -> None:
        self.weights.append(pl_module.layer.weight.detach().double().clone())


def run(directory: Path, steps: int, ema: WeightEMA, checkpoint: Path | None = None) -> list[torch.Tensor]:
    """Train for `steps`; the weights after each."""
    torch.manual_seed(0)
    history = History()
    saver = ModelCheckpoint(dirpath=directory, every_n_train_steps=3, save_last=True)
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, callbacks=[ema, history, saver], logger=False, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(BoringModel(), ckpt_path=checkpoint)
    return history.weights


def average(ema: WeightEMA) -> torch.Tensor:
    """The averaged weight of the layer."""
    return ema.shadow.state_dict()["layer.weight"]


@pytest.mark.parametrize("warmup", [0.0, 2.0])
def test_average_is_the_closed_form_of_the_weights(tmp_path, warmup) -> None:
    torch.manual_seed(0)
    expected = BoringModel().layer.weight.detach().double()  # the same draw as the run's
    ema = WeightEMA(decay=0.75, warmup=warmup)
    weights = run(tmp_path, 9, ema)
    for n, live in enumerate(weights):
        decay = min(0.75, (1 + n) / (1 + n + warmup))
        expected = decay * expected + (1 - decay) * live
    torch.testing.assert_close(average(ema).double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(average(ema).double(), weights[-1], rtol=1e-3)


def test_warmup_of_nine_is_that_of_diffusers() -> None:
    published = EMAModel([torch.zeros(1)], decay=0.98, use_ema_warmup=False)
    ema = WeightEMA(decay=0.98, warmup=9)
    for n in range(1, 600):  # at 0 diffusers takes the weights as they are
        assert ema.decay_after(n) == pytest.approx(published.get_decay(n + 1))


def test_a_resumed_run_goes_on_in_the_warmup(tmp_path) -> None:
    first, resumed = WeightEMA(decay=0.98, warmup=4), WeightEMA(decay=0.98, warmup=4)
    run(tmp_path, 3, first)
    expected = average(first).double()
    weights = run(tmp_path, 6, resumed, tmp_path / "last.ckpt")
    for n, live in enumerate(weights, start=3):
        decay = (1 + n) / (5 + n)
        expected = decay * expected + (1 - decay) * live
    assert len(weights) == 3
    torch.testing.assert_close(average(resumed).double(), expected, rtol=1e-5, atol=1e-6)


class Forget(Callback):
    """Sets the weights to 0 after every step, so that the average holds nothing but what it began with."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: BoringModel, *args: object) -> None:
        with torch.no_grad():
            pl_module.layer.weight.zero_()


@pytest.mark.parametrize(
    ("ema", "iterations"),
    [
        ({"decay": 0.9}, 5),
        ({"decay": 0.9, "every": 3}, 8),
        ({"decay": 0.98, "warmup": 4.0}, 6),
        ({"decay": 0.5, "every": 9}, 4),
    ],
)
def test_the_share_of_the_start_is_what_a_run_leaves_of_it(ema: dict, iterations: int) -> None:
    torch.manual_seed(0)
    start, averaged = BoringModel().layer.weight.detach(), WeightEMA(**ema)
    torch.manual_seed(0)
    Trainer(
        accelerator="cpu", max_steps=iterations, callbacks=[Forget(), averaged], logger=False, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    ).fit(BoringModel())  # fmt: skip
    torch.testing.assert_close(average(averaged), averaged.share_of_start(iterations, 1) * start)


def test_an_average_follows_at_the_end_of_an_iteration() -> None:
    """Of two optimizer steps each: every 3 steps is every second iteration, every step is every iteration."""
    assert WeightEMA(decay=0.5, every=3).share_of_start(7, 2) == 0.5**3
    assert WeightEMA(decay=0.5, every=1).share_of_start(7, 2) == 0.5**7


def test_a_negative_warmup_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup is -1"):
        WeightEMA(warmup=-1)
