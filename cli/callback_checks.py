"""Lightning's own callbacks in a run of this project: which would do nothing, or something else than they say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import callbacks as theirs

from datamodules.stream import StreamedDataModule
from flow_rl.planning.setup import Setup
from flow_rl.suggestions import nearest
from lightning_modules import GRPOPolicy
from lightning_modules.base import TrainedModule

#: callbacks that are refused, the reason, and what to use instead
REFUSED = {
    "StochasticWeightAveraging": ("deep-copies the module and counts epochs", "Use callbacks.WeightEMA"),
    "WeightAveraging": ("deep-copies the module, which sharded weights do not allow", "Use callbacks.WeightEMA"),
    "BatchSizeFinder": (
        "tries out a batch size that no stage has",
        "Use train.py doctor --fit, which proposes sizes that fit",
    ),
    "LearningRateFinder": ("trains the weights while it looks", "Set model.optimizer.lr"),
    "GradientAccumulationScheduler": (
        "counts epochs, which the training data don't have",
        "Set model.objective.micro_batch_size, or trainer.accumulate_grad_batches where the stage takes it",
    ),
    "BaseFinetuning": ("freezes and thaws weights by epoch", "Set model.lora to train an adapter"),
    "ModelPruning": ("changes the weights behind the stage's back", "Leave it out"),
    "OnExceptionCheckpoint": (
        "saves in the middle of an iteration, and on several ranks waits for those that have no error",
        "Use callbacks.Preemption and ModelCheckpoint",
    ),
}


def problems_of_callbacks(setup: Setup) -> list[str]:
    """What is wrong with the callbacks of a run, in sentences; empty where nothing is."""
    if setup.stage != "fit" or not isinstance(setup.model, TrainedModule):
        return []
    return [message for name, callback in setup.callbacks.items() for message in _problems(setup, name, callback)]


def _problems(setup: Setup, name: str, callback: Any) -> Iterator[str]:
    where = name if name.startswith("trainer.") else f"callbacks.{name}"
    for refused, (reason, instead) in REFUSED.items():
        if isinstance(callback, getattr(theirs, refused)):
            yield f"{where} ({type(callback).__name__}) can't be used: it {reason}. {instead}."
    if isinstance(callback, theirs.ModelCheckpoint):
        yield from _checkpoint(setup, where, callback)
    if isinstance(callback, (theirs.ModelCheckpoint, theirs.EarlyStopping)) and callback.monitor is not None:
        yield from _monitor(setup, where, callback.monitor)
    if isinstance(callback, theirs.EarlyStopping) and callback._check_on_train_epoch_end:
        yield f"{where}.check_on_train_epoch_end is true, but the training data have no epochs. Leave it out."


def _checkpoint(setup: Setup, where: str, callback: theirs.ModelCheckpoint) -> Iterator[str]:
    filename = callback.filename or ""
    if "/" in filename or "\\" in filename:
        yield (
            f"{where}.filename is '{filename}': its slashes would make folders, in which --ckpt_path last finds "
            "nothing. Names of metrics have slashes: leave them out, as in '{step}' (monitor still chooses by them)."
        )
    if callback.save_weights_only:
        yield (
            f"{where}.save_weights_only is true: nothing could be resumed from its checkpoints, which --ckpt_path last "
            "would find. Leave it out; callbacks.ExportModel writes weights alone."
        )
    by_epoch = (callback._every_n_epochs or 0) > 0 and callback._train_time_interval is None
    by_epoch = by_epoch and not callback._every_n_train_steps
    # With a metric of validation it saves after each validation.
    waits = callback.monitor is None or callback._save_on_train_epoch_end
    if isinstance(setup.data, StreamedDataModule) and by_epoch and waits:
        yield (
            f"{where} saves at the end of epochs, of which an endless stream of training data has none. Set "
            "every_n_train_steps."
        )


def _monitor(setup: Setup, where: str, monitor: str) -> Iterator[str]:
    if monitor.startswith("val/") and setup.trainer.get("limit_val_batches") == 0:
        yield f"{where}.monitor is '{monitor}', but trainer.limit_val_batches is 0: nothing is validated."
    elif isinstance(setup.model, GRPOPolicy) and monitor.startswith("val/"):
        reward = monitor.removeprefix("val/").partition("/")[0]
        names = [f"val/{name}/mean" for name in setup.profile.rewards]
        if reward not in setup.profile.rewards or monitor.count("/") < 2:
            listed = ", ".join(names)
            yield (
                f"{where}.monitor is '{monitor}', which no validation logs.{nearest(monitor, names)} It logs {listed}, "
                "and the same by category."
            )
    elif "/" not in monitor and monitor.startswith("val"):
        yield (
            f"{where}.monitor is '{monitor}', which nothing logs: metrics of validation begin with 'val/'. Set it to "
            "one of those that TensorBoard shows."
        )
