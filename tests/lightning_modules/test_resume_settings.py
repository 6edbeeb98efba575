"""A resumed run does what it is told now, with the state that it had."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from flow_rl.flow.windows import WindowSettings

TWO_STEPS = {"num_steps": 2, "window": WindowSettings(kind="all")}


def fit(module: LightningModule, data: LightningDataModule, directory: Path, *, steps: int, resume: bool) -> None:
    """So many updates in all, with a checkpoint of the last."""
    Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[ModelCheckpoint(dirpath=directory, every_n_train_steps=1, save_last=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    ).fit(module, data, ckpt_path=directory / "last.ckpt" if resume else None)


def test_a_new_learning_rate_wins_over_the_checkpoints(policy, data, tmp_path) -> None:
    def run(rate: float, steps: int, *, resume: bool) -> torch.optim.Optimizer:
        module = policy("nft", rollout=TWO_STEPS, optimizer=partial(torch.optim.AdamW, lr=rate, betas=(0.5, 0.9)))
        seen = []
        module.on_train_end = lambda: seen.append(module.optimizers().optimizer)
        fit(module, data(), tmp_path, steps=steps, resume=resume)
        return seen[0]

    run(1e-3, 1, resume=False)
    optimizer = run(2e-4, 2, resume=True)
    assert optimizer.param_groups[0]["lr"] == 2e-4
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}


def test_a_schedule_follows_the_updates_and_goes_on_where_it_was(policy, data, tmp_path) -> None:
    def run(steps: int, *, resume: bool) -> dict[int, float]:
        module = policy(
            "nft",
            rollout=TWO_STEPS,
            objective={"updates": 2},
            optimizer=partial(torch.optim.AdamW, lr=1e-3),
            lr_scheduler=partial(torch.optim.lr_scheduler.PolynomialLR, total_iters=8, power=1.0),
        )
        rates = {}

        def note(optimizer: torch.optim.Optimizer) -> None:
            rates[module.global_step] = optimizer.param_groups[0]["lr"]

        module.on_before_optimizer_step = note
        fit(module, data(), tmp_path, steps=steps, resume=resume)
        return rates

    found = run(4, resume=False) | run(8, resume=True)
    assert found == pytest.approx({step: 1e-3 * (1 - step / 8) for step in range(8)})
