"""Every argument of `lightning.Trainer`: honoured, or refused with the reason and what to use instead.

`docs/trainer_arguments.md` is this table for readers; a test compares both with the Trainer that is installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy

from datamodules.stream import StreamedDataModule
from flow_rl.planning.setup import Setup
from lightning_modules.base import TrainedModule
from strategies import FSDP2Strategy, ReplicatedStrategy

Check = Callable[[Setup, Any], Iterator[str]]
#: strategies that train as this project computes gradients and writes checkpoints
STRATEGIES = (SingleDeviceStrategy, FSDP2Strategy, ReplicatedStrategy)
_ACCELERATORS = ("auto", "cpu", "gpu", "cuda")
_INSTEAD = (
    "Set trainer.strategy to one that shards (configs/strategy/fsdp2.yaml), or to one that keeps all weights on every "
    "rank (configs/strategy/ddp.yaml)."
)


def problems_of_trainer(setup: Setup) -> list[str]:
    """What is wrong with the trainer's arguments for this run, in sentences; empty where nothing is."""
    found: list[str] = []
    for name, check in CHECKS.items():
        given = setup.trainer.get(name)
        if check is not None and (setup.stage == "fit" or name not in OF_TRAINING):
            found += check(setup, given)
    return found


def problem_of_strategy(strategy: Strategy) -> str | None:
    """What is wrong with the strategy that Lightning has chosen, which `auto` leaves to the devices it finds."""
    if isinstance(strategy, STRATEGIES):
        return None
    return _unfit_strategy(type(strategy).__name__)


def _unfit_strategy(name: str) -> str:
    return (
        f"trainer.strategy is {name}, which does not know how this project adds up gradients: several backward passes "
        f"a step, through weights that are used more than once. {_INSTEAD}"
    )


# ----------------------------------------------------------------- where it runs


def _accelerator(setup: Setup, given: Any) -> Iterator[str]:
    if isinstance(given, str) and given not in _ACCELERATORS:
        yield (
            f"trainer.accelerator is '{given}'. Nothing here has been run on it: use {', '.join(_ACCELERATORS[:-1])} "
            f"or {_ACCELERATORS[-1]}."
        )


def _strategy(setup: Setup, given: Any) -> Iterator[str]:
    if not isinstance(setup.model, TrainedModule):
        return
    if given is None or given == "auto":
        if setup.ranks > 1:
            yield f"trainer.strategy is auto, which is plain DDP on {setup.ranks} ranks. {_INSTEAD}"
    elif isinstance(given, str):
        if given != "single_device":
            yield _unfit_strategy(f"'{given}'")
    elif isinstance(given, Mapping) and not issubclass(_class(given), STRATEGIES):
        yield _unfit_strategy(str(given["class_path"]))


def _num_nodes(setup: Setup, given: Any) -> Iterator[str]:
    if given is not None and given < 1:
        yield f"trainer.num_nodes is {given}; it must be at least 1."


def _precision(setup: Setup, given: Any) -> Iterator[str]:
    if str(given).startswith(("64", "transformer-engine")):
        yield (
            f"trainer.precision is {given}, which nothing here has been run in. Use 32-true; blocks compute in "
            "bfloat16 under a sharding strategy."
        )


def _plugins(setup: Setup, given: Any) -> Iterator[str]:
    for plugin in given if isinstance(given, list) else [] if given is None else [given]:
        if isinstance(plugin, Mapping) and not issubclass(_class(plugin), ClusterEnvironment):
            yield (
                f"trainer.plugins has {plugin['class_path']}. Only cluster environments are taken: precision is "
                "trainer.precision and that of the strategy, and checkpoints are written by the strategy, whole or not "
                "at all. Leave it out."
            )


def _use_distributed_sampler(setup: Setup, given: Any) -> Iterator[str]:
    if given is not False and setup.ranks > 1 and isinstance(setup.model, TrainedModule):
        yield (
            "trainer.use_distributed_sampler is true, but the data modules share their batches over the ranks "
            "themselves. Set it to false (configs/strategy/*.yaml do)."
        )


def _sync_batchnorm(setup: Setup, given: Any) -> Iterator[str]:
    if given:
        yield "trainer.sync_batchnorm is true, but no model here has a batch norm: nothing would change. Leave it out."


# ----------------------------------------------------------------- how long it runs


def _streams(setup: Setup) -> bool:
    return isinstance(setup.data, StreamedDataModule)


def _max_epochs(setup: Setup, given: Any) -> Iterator[str]:
    trainer = setup.trainer
    limit = trainer.get("limit_train_batches")
    ends = given == 1 and isinstance(limit, int) and limit > 0  # an epoch of so many batches, once
    if not _streams(setup) or trainer.get("fast_dev_run") or not given or given < 0 or ends:
        return
    yield (
        f"trainer.max_epochs is {given}, but the training data are one endless stream, in which no epoch ever ends. "
        "Set trainer.max_steps (optimizer steps) or trainer.max_time, and leave it out."
    )


def _min_epochs(setup: Setup, given: Any) -> Iterator[str]:
    if given and _streams(setup):
        yield f"trainer.min_epochs is {given}, but the training data have no epochs. Set trainer.min_steps."


def _min_steps(setup: Setup, given: Any) -> Iterator[str]:
    most = setup.trainer.get("max_steps") or -1
    if given and 0 < most < given:
        yield f"trainer.min_steps is {given}, above trainer.max_steps = {most}. Lower the one or raise the other."


def _reload(setup: Setup, given: Any) -> Iterator[str]:
    if given and _streams(setup):
        yield (
            f"trainer.reload_dataloaders_every_n_epochs is {given}, but the training data are one endless stream, "
            "whose position would be lost. Leave it out."
        )


# ----------------------------------------------------------------- validation and logs


def _val_check_interval(setup: Setup, given: Any) -> Iterator[str]:
    if given is None or not _streams(setup):
        return
    if isinstance(given, bool) or not isinstance(given, int):
        kind = "a share of an epoch" if isinstance(given, float) else "a time, at which a resumed run would not be"
        yield (
            f"trainer.val_check_interval is {given}, {kind}; the training data are one endless stream without epochs. "
            "Set it to a number of iterations, such as 25."
        )
    elif given < 1:
        yield f"trainer.val_check_interval is {given}; it must be at least 1. limit_val_batches=0 never validates."


def _check_val_every_n_epoch(setup: Setup, given: Any) -> Iterator[str]:
    if given not in (None, 1) and _streams(setup):
        yield (
            f"trainer.check_val_every_n_epoch is {given}, but the training data have no epochs: nothing would ever be "
            "validated. Set it to null, and trainer.val_check_interval to a number of iterations."
        )


def _log_every_n_steps(setup: Setup, given: Any) -> Iterator[str]:
    if given is not None and given < 1:
        yield (
            f"trainer.log_every_n_steps is {given}: nothing would be logged. Set it to 1 or more; trainer.logger=false "
            "leaves out the logs."
        )


def _enable_progress_bar(setup: Setup, given: Any) -> Iterator[str]:
    bars = [name for name, callback in setup.callbacks.items() if isinstance(callback, ProgressBar)]
    if len(bars) > 1:
        yield f"callbacks.{' and callbacks.'.join(bars)} are progress bars, and a run has one. Set all but one to null."


def _barebones(setup: Setup, given: Any) -> Iterator[str]:
    if given:
        yield (
            "trainer.barebones is true: logs, checkpoints and validation would be left out, and with them what a run "
            "is for. Leave it out; python -m benchmarks.gpu measures speed."
        )


def _model_registry(setup: Setup, given: Any) -> Iterator[str]:
    if given:
        yield (
            f"trainer.model_registry is '{given}': checkpoints would be uploaded elsewhere, and not written as a "
            "resume needs them. Leave it out; callbacks.ExportModel writes what can be published."
        )


# ----------------------------------------------------------------- gradients


def _gradient_clip_val(setup: Setup, given: Any) -> Iterator[str]:
    if given and isinstance(setup.model, TrainedModule):
        yield "trainer.gradient_clip_val has no effect on this stage: set model.gradient_clip and leave it out."


def _gradient_clip_algorithm(setup: Setup, given: Any) -> Iterator[str]:
    if given and isinstance(setup.model, TrainedModule):
        yield (
            f"trainer.gradient_clip_algorithm is '{given}', and has no effect on this stage: model.gradient_clip "
            "limits the norm of all gradients. Leave it out."
        )


def _class(spec: Mapping[str, Any]) -> type:
    module, _, name = str(spec["class_path"]).rpartition(".")
    found: type = getattr(importlib.import_module(module), name)
    return found


#: every argument of the Trainer and what is checked; None where all that Lightning takes is honoured
CHECKS: dict[str, Check | None] = {
    "accelerator": _accelerator,
    "strategy": _strategy,
    "devices": None,
    "num_nodes": _num_nodes,
    "precision": _precision,
    "logger": None,
    "callbacks": None,
    "fast_dev_run": None,
    "max_epochs": _max_epochs,
    "min_epochs": _min_epochs,
    "max_steps": None,
    "min_steps": _min_steps,
    "max_time": None,
    "limit_train_batches": None,
    "limit_val_batches": None,
    "limit_test_batches": None,
    "limit_predict_batches": None,
    "overfit_batches": None,
    "val_check_interval": _val_check_interval,
    "check_val_every_n_epoch": _check_val_every_n_epoch,
    "num_sanity_val_steps": None,
    "log_every_n_steps": _log_every_n_steps,
    "enable_checkpointing": None,
    "enable_progress_bar": _enable_progress_bar,
    "enable_model_summary": None,
    "accumulate_grad_batches": None,
    "gradient_clip_val": _gradient_clip_val,
    "gradient_clip_algorithm": _gradient_clip_algorithm,
    "deterministic": None,
    "benchmark": None,
    "inference_mode": None,
    "use_distributed_sampler": _use_distributed_sampler,
    "profiler": None,
    "detect_anomaly": None,
    "barebones": _barebones,
    "plugins": _plugins,
    "sync_batchnorm": _sync_batchnorm,
    "reload_dataloaders_every_n_epochs": _reload,
    "default_root_dir": None,
    "enable_autolog_hparams": None,
    "model_registry": _model_registry,
}
#: those that say nothing of a run that only samples
OF_TRAINING = (
    "max_epochs",
    "min_epochs",
    "min_steps",
    "val_check_interval",
    "check_val_every_n_epoch",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "reload_dataloaders_every_n_epochs",
)
