"""A resumed run does what it is told now, with the state that it had."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


def test_a_new_learning_rate_wins_over_the_checkpoints(policy, data, tmp_path) -> None:
    def run(rate: float, steps: int, resume: str | None):
        module = policy(
            "nft", rollout={"num_steps": 2}, optimizer=partial(torch.optim.AdamW, lr=rate, betas=(0.5, 0.9))
        )
        seen = []
        module.on_train_end = lambda: seen.append(module.optimizers().optimizer)
        Trainer(
            accelerator="cpu",
            max_steps=steps,
            callbacks=[ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_last=True)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        ).fit(module, data(), ckpt_path=resume)
        return seen[0]

    run(1e-3, 1, None)
    optimizer = run(2e-4, 2, str(tmp_path / "last.ckpt"))
    assert optimizer.param_groups[0]["lr"] == 2e-4
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}


def test_a_schedule_follows_the_updates_and_goes_on_where_it_was(policy, data, tmp_path) -> None:
    def run(steps: int, resume: str | None = None) -> dict[int, float]:
        module = policy(
            "nft",
            rollout={"num_steps": 2},
            objective={"updates": 2},
            optimizer=partial(torch.optim.AdamW, lr=1e-3),
            lr_scheduler=partial(torch.optim.lr_scheduler.PolynomialLR, total_iters=8, power=1.0),
        )
        rates = {}

        def note(optimizer: torch.optim.Optimizer) -> None:
            rates[module.global_step] = optimizer.param_groups[0]["lr"]

        module.on_before_optimizer_step = note
        Trainer(
            accelerator="cpu",
            max_steps=steps,
            callbacks=[ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_last=True)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        ).fit(module, data(), ckpt_path=resume)
        return rates

    found = run(4) | run(8, str(tmp_path / "last.ckpt"))
    assert found == pytest.approx({step: 1e-3 * (1 - step / 8) for step in range(8)})
