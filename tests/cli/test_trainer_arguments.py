"""The Trainer's whole argument list is known: code, documentation and the Trainer that is installed agree."""

from __future__ import annotations

import inspect
import re
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning import LightningModule, Trainer
from lightning.pytorch import callbacks as theirs
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from callbacks import PhaseProgressBar
from callbacks.tensorboard import tensorboards, writers
from cli.callback_checks import REFUSED, problems_of_callbacks
from cli.trainer_arguments import CHECKS, problem_of_strategy, problems_of_trainer
from datamodules.stream import StreamedDataModule
from flow_rl.planning.setup import Setup
from flow_rl.planning.stage import Profile
from lightning_modules import GRPOPolicy
from strategies import ReplicatedStrategy

ROOT = Path(__file__).parents[2]
ARGUMENTS = [name for name in inspect.signature(Trainer.__init__).parameters if name != "self"]


class Policy(GRPOPolicy):
    """Two rewards and no weights."""

    def __init__(self) -> None:
        LightningModule.__init__(self)

    def profile(self) -> Profile:
        return Profile(manual=True, rewards={"alignment": SimpleNamespace(), "quality": SimpleNamespace()})


def setup_with(trainer: dict[str, Any] | None = None, stage: str = "fit", **callbacks: Any) -> Setup:
    checkpoints = [c for c in callbacks.values() if isinstance(c, theirs.ModelCheckpoint)]
    return Setup(
        model=Policy(), data=StreamedDataModule(), trainer=trainer or {}, callbacks=callbacks, checkpoints=checkpoints,
        stage=stage,
    )  # fmt: skip


def test_code_and_documentation_know_every_argument() -> None:
    assert list(CHECKS) == ARGUMENTS
    text = (ROOT / "docs" / "trainer_arguments.md").read_text(encoding="utf-8").split("## Callbacks")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ?(.*)\|$", text, re.MULTILINE)
    assert [name for name, _, _ in rows] == ARGUMENTS
    for name, verdict, why in rows:
        assert verdict in ("honoured", "partly", "refused")
        assert verdict == "honoured" or why.strip(), name


def test_documentation_names_every_refused_callback() -> None:
    text = (ROOT / "docs" / "trainer_arguments.md").read_text(encoding="utf-8")
    kin = {"BaseFinetuning": "BackboneFinetuning"}
    assert [name for name in REFUSED if f"`{kin.get(name, name)}`" not in text] == []


#: values that every run takes, by argument
TAKEN = {
    "max_epochs": [None, -1], "min_epochs": [None, 0], "max_steps": [-1, 7], "min_steps": [None, 0, 3],
    "max_time": [None, "00:01:00:00", {"hours": 2}], "limit_val_batches": [None, 0, 3, 0.5],
    "val_check_interval": [None, 1, 1000], "check_val_every_n_epoch": [None, 1], "num_sanity_val_steps": [0, 2],
    "log_every_n_steps": [None, 1, 50], "enable_progress_bar": [None, False, True], "gradient_clip_val": [None],
    "precision": [None, "32-true", 32, "bf16-mixed"], "accelerator": ["auto", "cpu"], "devices": [1, "auto", [0]],
    "num_nodes": [1], "deterministic": [None, False], "profiler": [None, "simple"], "detect_anomaly": [False],
    "barebones": [False], "sync_batchnorm": [False], "reload_dataloaders_every_n_epochs": [0], "plugins": [None, []],
    "strategy": ["auto", "single_device"], "logger": [False, None], "inference_mode": [True, False],
    "use_distributed_sampler": [False, True], "fast_dev_run": [False, 1, True], "model_registry": [None],
}  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in TAKEN.items()}))
def test_what_is_honoured_is_not_refused_together_with_anything_else(trainer) -> None:
    assert problems_of_trainer(setup_with(trainer)) == []


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["max_epochs", "min_epochs", "val_check_interval", "check_val_every_n_epoch", "log_every_n_steps"]),
    st.one_of(st.integers(-5, 5), st.builds(lambda n: n / 4, st.integers(1, 12))),
)
def test_counts_are_taken_or_refused_by_their_name(name, value) -> None:
    """Epochs never end, shares of one have no length, and intervals begin at 1."""
    refused = {
        "max_epochs": value > 0, "min_epochs": value != 0, "val_check_interval": isinstance(value, float) or value < 1,
        "check_val_every_n_epoch": value != 1, "log_every_n_steps": value < 1,
    }[name]  # fmt: skip
    found = problems_of_trainer(setup_with({name: value}))
    assert len(found) == refused
    assert all(message.startswith(f"trainer.{name} is {value}") for message in found)


def test_an_epoch_of_a_given_length_may_be_the_run() -> None:
    assert problems_of_trainer(setup_with({"max_epochs": 1, "limit_train_batches": 5})) == []


@pytest.mark.parametrize("name", ["max_epochs", "val_check_interval", "gradient_clip_val"])
def test_a_run_that_only_samples_may_keep_the_settings_of_training(name) -> None:
    assert problems_of_trainer(setup_with({name: 0.5}, stage="test")) == []


def test_somebody_elses_data_may_have_epochs() -> None:
    setup = Setup(model=Policy(), data=object(), trainer={"max_epochs": 3, "val_check_interval": 0.5})
    assert problems_of_trainer(setup) == []


def test_plain_ddp_is_refused_wherever_it_comes_from() -> None:
    assert "configs/strategy/ddp.yaml" in problem_of_strategy(DDPStrategy())
    assert problem_of_strategy(ReplicatedStrategy()) is None
    assert problem_of_strategy(SingleDeviceStrategy("cpu")) is None


def test_lightnings_callbacks_that_are_honoured() -> None:
    kept = {
        "checkpoint": theirs.ModelCheckpoint("x", every_n_train_steps=5, filename="{step}"),
        "best": theirs.ModelCheckpoint("y", monitor="val/alignment/mean", mode="max", save_on_train_epoch_end=False),
        "often": theirs.ModelCheckpoint("z", train_time_interval=timedelta(minutes=5)),
        "stop": theirs.EarlyStopping(monitor="val/quality/portrait"),
        "rate": theirs.LearningRateMonitor(),
        "progress": PhaseProgressBar(),
    }
    assert problems_of_callbacks(setup_with(**kept)) == []
    assert problems_of_trainer(setup_with(**kept)) == []


def test_every_tensorboard_logger_gets_pictures_wherever_it_stands(tmp_path) -> None:
    first, second = CSVLogger(tmp_path), TensorBoardLogger(tmp_path, name="tb")
    trainer = Trainer(logger=[first, second], accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False)
    assert tensorboards(trainer) == [second]
    assert writers(trainer) == [second.experiment]
    assert tensorboards(Trainer(logger=False, accelerator="cpu", barebones=False)) == []
