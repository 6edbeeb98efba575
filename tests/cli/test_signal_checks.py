"""Runs that would train on nothing new, or export what they began with, are refused before they start."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from callbacks import WeightEMA
from cli import app
from cli.doctor_checks import faults
from datamodules.stream import StreamedDataModule
from flow_rl.planning.setup import Setup
from flow_rl.planning.stage import Profile

ROOT = Path(__file__).parents[2]


def found(trainer: dict[str, Any], *, ema: WeightEMA | None = None, updates: int = 1, data: Any = None) -> list[str]:
    """What is wrong with such a run."""
    profile = Profile(manual=True, make_optimizer=None, updates=updates)
    demands = [] if ema is None else [ema.demands()]
    return faults(Setup(model=SimpleNamespace(profile=lambda: profile), data=data, trainer=trainer, demands=demands))


@pytest.mark.parametrize(
    ("ema", "steps", "updates"),
    [
        ({"decay": 0.9}, 21, 1),  # 0.9^21 = 0.109
        ({"decay": 0.98}, 20, 1),
        ({"decay": 0.9, "every": 8}, 160, 1),
        ({"decay": 0.9, "every": 8}, 7, 1),  # never follows at all
        ({"decay": 0.9}, 42, 2),  # an average follows once an iteration
    ],
)
def test_an_average_that_keeps_the_base_is_refused(ema: dict, steps: int, updates: int) -> None:
    (message,) = found({"max_steps": steps}, ema=WeightEMA(**ema), updates=updates)
    assert f"After trainer.max_steps = {steps}, " in message
    assert "--callbacks.ema.warmup=9" in message
    assert "--callbacks.ema=null" in message


@pytest.mark.parametrize(
    ("ema", "trainer"),
    [
        ({"decay": 0.9}, {"max_steps": 22}),  # 0.9^22 = 0.098
        ({"decay": 0.98, "warmup": 4.0}, {"max_steps": 2}),  # 1/5 * 2/6
        ({"decay": 0.9, "warmup": 9.0}, {"max_steps": 1}),
        ({"decay": 0.98}, {"max_steps": 2, "fast_dev_run": True}),
        ({"decay": 0.98}, {"max_steps": -1}),  # nobody knows
    ],
)
def test_an_average_that_leaves_the_base_passes(ema: dict, trainer: dict[str, Any]) -> None:
    assert found(trainer, ema=WeightEMA(**ema)) == []


@pytest.mark.parametrize(
    ("trainer", "name"),
    [
        ({"overfit_batches": 1}, "trainer.overfit_batches is 1"),
        ({"overfit_batches": 0.5}, "trainer.overfit_batches is 0.5"),
        ({"limit_train_batches": 5}, "trainer.limit_train_batches is 5"),
        ({"limit_train_batches": 5, "max_steps": 6}, "trainer.limit_train_batches is 5"),
        ({"limit_train_batches": 0, "max_steps": 6}, "nothing would be trained"),
        ({"limit_train_batches": 0.25}, "trainer.limit_train_batches is 0.25"),
    ],
)
def test_a_stream_that_would_start_over_is_refused(trainer: dict[str, Any], name: str) -> None:
    (message,) = found(trainer, data=StreamedDataModule())
    assert name in message
    assert "Set trainer.max_steps for a shorter run" in message


@pytest.mark.parametrize(
    "trainer",
    [
        {},
        {"limit_train_batches": 1.0},
        {"limit_train_batches": 5, "max_steps": 5},
        {"limit_train_batches": 5, "max_epochs": 1},
        {"limit_train_batches": 1, "fast_dev_run": 1},
        {"overfit_batches": 0.0},
    ],
)
def test_a_stream_that_goes_on_passes(trainer: dict[str, Any]) -> None:
    assert found(trainer, data=StreamedDataModule()) == []


def test_an_iteration_of_several_updates_takes_one_batch() -> None:
    assert found({"limit_train_batches": 5, "max_steps": 10}, updates=2, data=StreamedDataModule()) == []


def test_a_run_with_a_constant_reward_fails_and_keeps_its_checkpoints(
    tmp_path: Path, tiny_path: str, prompt_files: dict[str, str], monkeypatch, capsys
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        app.main([
            "fit",
            "--config=configs/demo/t2i_teacher.yaml",
            "--config=configs/debug/two_steps.yaml",
            f"--model.model_path={tiny_path}",
            "--model.rewards={same: {class_path: tests.planted.Broken}}",
            "--model.reward_weights={same: 1.0}",
            "--model.max_silent=2",
            *(f"--data.{name}={path}" for name, path in prompt_files.items()),
            f"--run.dir={tmp_path}",
            "--trainer.limit_val_batches=0",
            "--callbacks.checkpoint.every_n_train_steps=1",
            "--callbacks.probe=null",
        ])  # fmt: skip
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert "the last 2 iterations (model.max_silent) taught nothing" in told
    assert "'same' gave 3 to every image" in told
    assert list((tmp_path / "t2i_teacher" / "checkpoints").glob("*.ckpt"))


def test_data_of_somebody_else_may_be_limited() -> None:
    assert found({"limit_train_batches": 5}, data=object()) == []
