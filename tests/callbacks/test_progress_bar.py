"""The bar's length is the run's, from the start and after a resume in the middle of the stream."""

from __future__ import annotations

from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import PhaseProgressBar


class Lengths(Callback):
    def __init__(self, bar: PhaseProgressBar) -> None:
        self.bar, self.seen = bar, []

    def on_train_batch_end(self, *args) -> None:
        self.seen.append((self.bar.train_progress_bar.initial, self.bar.train_progress_bar.total))


def test_a_resumed_run_shows_how_much_is_left(policy, data, tmp_path) -> None:
    def fit(steps: int, checkpoint: str | None = None) -> list[tuple[int, int]]:
        bar = PhaseProgressBar()
        lengths = Lengths(bar)
        trainer = Trainer(
            accelerator="cpu",
            max_steps=steps,
            callbacks=[bar, lengths, ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_last="link")],
            logger=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(policy("nft", objective={"updates": 1}), data(), ckpt_path=checkpoint)
        return lengths.seen

    assert fit(2) == [(0, 2)] * 2
    assert fit(4, str(tmp_path / "last.ckpt")) == [(2, 4)] * 2
