"""Bad YAML, settings and arguments of the Trainer: one message each, before anything is built."""

from __future__ import annotations

import pytest
from jsonargparse import Namespace
from lightning import Trainer
from lightning.pytorch import callbacks as theirs

from callbacks import PhaseProgressBar
from cli.callback_checks import problems_of_callbacks
from cli.config_stack import expand
from cli.named_callbacks import wanted
from cli.start_checks import check_name
from cli.trainer_arguments import problems_of_trainer
from flow_rl.errors import SettingError
from tests.cli.test_trainer_arguments import setup_with

FILES = [
    (b"run: {name: a}\nrun: {name: b}\n", "f.yaml:2: 'run' appears twice in one mapping, first on line 1"),
    (b"run:\n  name: a\n  name: b\n", "f.yaml:3: 'name' appears twice in one mapping, first on line 2"),
    (b"model: {a: 1, 'a': 2}\n", "f.yaml:1: 'a' appears twice"),
    (b"trainer.max_steps: 3\ntrainer: {max_steps: 4}\n", "f.yaml:2: trainer.max_steps is set here and on line 1"),
    (b"model:\n  lr: 1\n  init_args: {lr: 2}\n", "f.yaml:3: model.lr is set here and on line 2"),
    (b"a: [1\nb: 2\n", "f.yaml:2: not valid YAML"),
    (b"a: b: c\n", "f.yaml:1: not valid YAML"),
    (b"a:\n\t- b\n", "f.yaml:2: not valid YAML (column 1): a tab"),
    (b"a: 1\n---\nb: 2\n", "f.yaml:2: not valid YAML (column 1): a second document"),
    (b"a: *x\n", "undefined alias"),
    (b"a: &x [*x]\n", "an anchor contains itself"),
    (b"? [a]\n: 1\n", "a key must be a word"),
    (b"a: {<<: 3}\n", "'<<' takes a mapping"),
    (b"a: !!binary aaaa\n", "the tag !!binary is not supported"),
    (b"a: !!python/name:os.system x\n", "the tag !!python/name:os.system is not supported"),
    (b"a: caf\xe9\n", "f.yaml:1: byte 0xe9 is not UTF-8"),
    ("a: 1".encode("utf-16"), "begins like UTF-16"),
    (b"a: \x00\n", "f.yaml:1: not valid YAML"),
    (b"include: missing.yaml\n", "there is no file"),
    (b"include: 3\n", "must be a path or a list of paths, received '3'"),
    (b"include: {a: 1}\n", "include must be a path or a list of paths"),
    (b"include: f.yaml\n", "a file can't come before itself"),
]


@pytest.mark.parametrize(("content", "words"), FILES)
def test_files(content, words, tmp_path) -> None:
    (tmp_path / "f.yaml").write_bytes(content)
    with pytest.raises(SettingError) as refused:
        expand(["fit", f"--config={tmp_path}/f.yaml"])
    assert words in str(refused.value)


TRAINER = [
    ({"max_epochs": 1}, "Set trainer.max_steps"),
    ({"max_epochs": 3, "max_steps": 5}, "trainer.max_epochs is 3"),
    ({"min_epochs": 2}, "Set trainer.min_steps"),
    ({"min_steps": 9, "max_steps": 4}, "above trainer.max_steps = 4"),
    ({"val_check_interval": 0.5}, "a share of an epoch"),
    ({"val_check_interval": "00:01:00:00"}, "a time"),
    ({"val_check_interval": 0}, "must be at least 1"),
    ({"check_val_every_n_epoch": 2}, "nothing would ever be validated"),
    ({"log_every_n_steps": 0}, "nothing would be logged"),
    ({"gradient_clip_val": 1.0}, "set model.gradient_clip"),
    ({"gradient_clip_algorithm": "value"}, "limits the norm"),
    ({"strategy": "ddp"}, "configs/strategy/ddp.yaml"),
    ({"strategy": "fsdp"}, "configs/strategy/fsdp2.yaml"),
    ({"strategy": "deepspeed_stage_2"}, "configs/strategy/fsdp2.yaml"),
    ({"strategy": {"class_path": "lightning.pytorch.strategies.DDPStrategy"}}, "configs/strategy/ddp.yaml"),
    ({"strategy": "auto", "devices": 2, "use_distributed_sampler": False}, "plain DDP on 2 ranks"),
    ({"accelerator": "tpu"}, "use auto, cpu, gpu or cuda"),
    ({"num_nodes": 0}, "at least 1"),
    ({"precision": "64-true"}, "Use 32-true"),
    ({"precision": "transformer-engine"}, "Use 32-true"),
    ({"barebones": True}, "Leave it out"),
    ({"sync_batchnorm": True}, "no model here has a batch norm"),
    ({"reload_dataloaders_every_n_epochs": 1}, "position would be lost"),
    ({"model_registry": "a/b"}, "callbacks.ExportModel"),
    ({"plugins": [{"class_path": "lightning.pytorch.plugins.precision.HalfPrecision"}]}, "cluster environments"),
]


@pytest.mark.parametrize(("trainer", "words"), TRAINER)
def test_trainer(trainer, words) -> None:
    (message,) = problems_of_trainer(setup_with(trainer))
    assert message.startswith("trainer.")
    assert words in message


CALLBACKS = [
    (lambda: theirs.ModelCheckpoint("x", filename="{val/a:.2f}", every_n_train_steps=1), "would make folders"),
    (lambda: theirs.ModelCheckpoint("x", save_weights_only=True, every_n_train_steps=1), "nothing could be resumed"),
    (lambda: theirs.ModelCheckpoint("x", every_n_epochs=1), "Set every_n_train_steps"),
    (lambda: theirs.EarlyStopping(monitor="val/aligment/mean"), "Did you mean 'val/alignment/mean'"),
    (lambda: theirs.EarlyStopping(monitor="val_loss"), "begin with 'val/'"),
    (lambda: theirs.StochasticWeightAveraging(1e-3), "Use callbacks.WeightEMA"),
    (lambda: theirs.BatchSizeFinder(), "train.py doctor --fit"),
    (lambda: theirs.LearningRateFinder(), "Set model.optimizer.lr"),
    (lambda: theirs.GradientAccumulationScheduler({1: 2}), "counts epochs"),
    (lambda: theirs.OnExceptionCheckpoint("x"), "Use callbacks.Preemption"),
]


@pytest.mark.parametrize(("make", "words"), CALLBACKS)
def test_callbacks(make, words) -> None:
    (message,) = problems_of_callbacks(setup_with(mine=make()))
    assert message.startswith("callbacks.mine")
    assert words in message


def test_switches_take_out_the_callbacks_that_they_switch_off() -> None:
    checkpoint, bar, mine = theirs.ModelCheckpoint("x"), PhaseProgressBar(), theirs.Timer()
    switches = {"enable_checkpointing": None, "enable_progress_bar": None}
    for off, left in (({}, 3), ({"enable_checkpointing": False}, 2), ({"enable_progress_bar": False}, 2)):
        found = wanted([checkpoint, bar, mine], Namespace(**(switches | off)))
        assert len(found) == left
        assert found[-1] is mine
        Trainer(callbacks=found, logger=False, accelerator="cpu", **(switches | off))  # Lightning takes them


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/x", "a/../../b"])
def test_names_of_runs(name) -> None:
    with pytest.raises(SettingError, match=r"it must name a folder below run\.dir"):
        check_name(name)
