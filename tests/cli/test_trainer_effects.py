"""What honoured arguments of the Trainer do to a stage of this project, seen from inside its steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from cli import app
from datamodules.stream import StreamedDataModule
from lightning_modules.base import TrainedModule
from tests.cli.command_lines import good


class Stage(TrainedModule):
    """One weight, trained as a stage trains: by manual optimization, or by automatic one."""

    model_path, lora, seed, make_scheduler = "nowhere", None, 0, None
    make_optimizer = staticmethod(partial(torch.optim.SGD, lr=1.0))
    base_digests = MappingProxyType({})

    def __init__(self, *, manual: bool = True, clip: float = 100.0, slope: float = 1.0, stop_at: int = 99) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.weight = nn.Parameter(torch.zeros(1))
        self.gradient_clip, self.slope, self.stop_at = clip, slope, stop_at
        self.events: list[tuple[str, Any]] = []
        self.about: dict[str, Any] = {}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        self.events.append(("train", self.global_step))
        self.about |= {
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "benchmark": torch.backends.cudnn.benchmark,
            "autocast": torch.is_autocast_enabled("cpu"),
        }
        loss = (self.weight * self.slope).sum()
        if self.global_step + 1 >= self.stop_at:
            self.trainer.should_stop = True
        self.log("loss", loss.detach())
        if self.automatic_optimization:
            self.note_loss(loss)
            return loss
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.finish_update(loss.detach(), iteration=batch_idx)
        return None

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.events.append(("sanity" if self.trainer.sanity_checking else "val", self.global_step))
        self.log("val/x", 1.0)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.events.append(("test", batch_idx))
        self.about["inference"] = torch.is_inference_mode_enabled()

    def predict_step(self, batch: Tensor, batch_idx: int) -> None:
        self.events.append(("predict", batch_idx))

    def steps(self, kind: str) -> list[Any]:
        return [at for name, at in self.events if name == kind]


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[Tensor]:
        return itertools.repeat(torch.ones(1))


class Stream(StreamedDataModule):
    """An endless stream to train on; five batches for everything else."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Endless(), batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(torch.ones(5, 1), batch_size=1)

    test_dataloader = predict_dataloader = val_dataloader


class Kept(Logger):
    """Remembers at which steps it was given what."""

    name, version = "kept", ""

    def __init__(self) -> None:
        self.steps: dict[str, list[int]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for metric in metrics:
            self.steps.setdefault(metric, []).append(step)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


Run = tuple[Stage, Trainer, Kept]


def ran(directory: Path, arguments: dict[str, Any], stage: dict[str, Any], command: str = "fit") -> Run:
    logger, module = Kept(), Stage(**stage)
    given = {
        "accelerator": "cpu", "max_steps": 6, "logger": logger, "enable_progress_bar": False,
        "enable_model_summary": False, "num_sanity_val_steps": 0, "check_val_every_n_epoch": None,
        "val_check_interval": 2, "log_every_n_steps": 1, "limit_val_batches": 1, "default_root_dir": directory,
        "enable_checkpointing": False,
    }  # fmt: skip
    trainer = Trainer(**given | arguments)
    getattr(trainer, command)(module, Stream())
    return module, trainer, logger


def clipped(run: Run) -> bool:
    """After two steps along a gradient of which 0.25 is left."""
    return run[0].weight.item() == pytest.approx(-0.5)


#: arguments of the Trainer, settings of the stage, and what must be so afterwards
EFFECTS: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[Run], bool]]] = {
    "max_steps": ({"max_steps": 3}, {}, lambda r: r[0].steps("train") == [0, 1, 2]),
    "limit_val_batches": ({"limit_val_batches": 3}, {}, lambda r: r[0].steps("val") == [2] * 3 + [4] * 3 + [6] * 3),
    "limit_val_batches, a share": ({"limit_val_batches": 0.4}, {}, lambda r: len(r[0].steps("val")) == 3 * 2),
    "limit_val_batches 0": ({"limit_val_batches": 0}, {}, lambda r: r[0].steps("val") == []),
    "val_check_interval": ({"val_check_interval": 3}, {}, lambda r: r[0].steps("val") == [3, 6]),
    "log_every_n_steps": ({"log_every_n_steps": 2}, {}, lambda r: r[2].steps["loss"] == [1, 3, 5]),
    "num_sanity_val_steps": (
        {"num_sanity_val_steps": 2, "limit_val_batches": 3, "max_steps": 1},
        {},
        lambda r: r[0].events == [("sanity", 0)] * 2 + [("train", 0)] and "val/x" not in r[2].steps,
    ),
    "max_time": ({"max_time": {"microseconds": 1}}, {}, lambda r: r[0].steps("train") == [0]),
    "min_steps": (
        {"min_steps": 4, "min_epochs": 0}, {"stop_at": 2}, lambda r: r[0].steps("train") == [0, 1, 2, 3],
    ),
    "min_steps, none": ({}, {"stop_at": 2}, lambda r: r[0].steps("train") == [0, 1]),
    "limit_train_batches": (
        {"limit_train_batches": 3, "max_epochs": 1, "max_steps": -1}, {}, lambda r: r[0].steps("train") == [0, 1, 2],
    ),
    "fast_dev_run": ({"fast_dev_run": 2}, {}, lambda r: len(r[0].steps("train")) == 2 and r[2].steps == {}),
    "accumulate_grad_batches": (
        {"accumulate_grad_batches": 2, "max_steps": 3},
        {"manual": False},
        lambda r: len(r[0].steps("train")) == 6 and r[0].weight.item() == -3,
    ),
    "enable_model_summary": (
        {"enable_model_summary": True, "max_steps": 1},
        {},
        lambda r: any(isinstance(c, ModelSummary) for c in r[1].callbacks),
    ),
    "enable_model_summary, false": ({}, {}, lambda r: not any(isinstance(c, ModelSummary) for c in r[1].callbacks)),
    "enable_checkpointing, false": (
        {"max_steps": 1}, {}, lambda r: not any(isinstance(c, ModelCheckpoint) for c in r[1].callbacks),
    ),
    "deterministic": ({"deterministic": True, "max_steps": 1}, {}, lambda r: r[0].about["deterministic"]),
    "benchmark": ({"benchmark": True, "max_steps": 1}, {}, lambda r: r[0].about["benchmark"]),
    "precision": ({"precision": "bf16-mixed", "max_steps": 1}, {}, lambda r: r[0].about["autocast"]),
    "profiler": (
        {"profiler": "simple", "max_steps": 2},
        {},
        lambda r: len(r[1].profiler.recorded_durations["run_training_batch"]) == 2,
    ),
    # Not an argument of the Trainer, whose own is refused: the norm of the gradient is 50, and the rate 1.
    "model.gradient_clip": ({"max_steps": 2}, {"clip": 0.25, "slope": 50.0}, clipped),
    "model.gradient_clip, automatic": (
        {"max_steps": 2}, {"clip": 0.25, "slope": 50.0, "manual": False}, clipped,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _process_as_before() -> Iterator[None]:
    settings = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(settings[0])
    torch.backends.cudnn.benchmark = settings[1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EFFECTS)
def test_argument_has_its_effect(name: str, tmp_path: Path) -> None:
    arguments, stage, holds = EFFECTS[name]
    run = ran(tmp_path, arguments, stage)
    assert holds(run), (run[0].events, run[0].about, run[2].steps)


@pytest.mark.usefixtures("only_fit", "nothing_loads")
def test_an_early_stop_waits_for_min_steps_alone(arrived: list, tiny_path: str, tmp_path: Path) -> None:
    """Lightning makes an epoch the least of a run with `min_steps`, and no epoch ends here: nothing would stop it."""
    app.main(good(tiny_path, tmp_path, "--trainer.min_steps=4"))
    assert arrived[0].trainer.min_epochs == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", ["test", "predict"])
def test_evaluations_are_as_long_as_their_limits(command: str, tmp_path: Path) -> None:
    for limit, count in ((2, 2), (0.6, 3), (1.0, 5)):
        module, *_ = ran(tmp_path, {f"limit_{command}_batches": limit}, {}, command)
        assert module.steps(command) == list(range(count))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("value", [True, False])
def test_inference_mode_is_that_of_evaluations(value: bool, tmp_path: Path) -> None:
    module, *_ = ran(tmp_path, {"inference_mode": value}, {}, "test")
    assert module.about["inference"] is value


@pytest.mark.filterwarnings("ignore")
def test_anomaly_detection_names_the_operation_that_a_step_would_leave_out(tmp_path: Path) -> None:
    """Without it, a step whose gradient is not finite is left out and counted."""
    module, *_ = ran(tmp_path, {"max_steps": 2}, {"slope": float("nan")})
    assert (module.weight.item(), module.skipped) == (0.0, 2)
    with pytest.raises(RuntimeError, match="returned nan values"):
        ran(tmp_path, {"max_steps": 2, "detect_anomaly": True}, {"slope": float("nan")})
    assert not torch.is_anomaly_enabled()
