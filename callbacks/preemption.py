"""Stop at the next step with a checkpoint when the machine is about to be taken away."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any, ClassVar

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from callbacks.run_checkpoint import RunCheckpoint
from flow_rl import stop_signal
from flow_rl.distributed.gradients import any_rank
from flow_rl.stop_signal import StopAsked
from strategies.checkpoint_files import SUFFIX

#: exit status of a run that stopped in good order and wants to be started again (EX_TEMPFAIL of sysexits.h)
EXIT_PREEMPTED = 75


class Preempted(SystemExit):
    """Ends the process with `EXIT_PREEMPTED`."""

    def __init__(self) -> None:
        super().__init__(EXIT_PREEMPTED)


class Preemption(Checkpoint):
    """SIGTERM or SIGUSR1 to any rank: all ranks finish their step, save one checkpoint and exit with status 75.

    The handler only sets a flag. Ranks vote after every `every`-th step, so it doesn't matter which of them got the
    signal, and the collectives of a step are never cut in two. Lightning's own handler, which communicates while the
    other ranks do something else, is put aside for the time of training. A signal during validation waits for the next
    step, and one after the last step changes nothing. A wait for scores is given up after ten seconds; on one rank, the
    state before the iteration is saved then.

    As a `Checkpoint` it runs after all other callbacks: the EMA and whatever else follows a step are saved as of it.

    Args:
        directory: where to save; None takes that of the run's `ModelCheckpoint`.
        every: steps between votes; one small message each.
    """

    SIGNALS: ClassVar[tuple[signal.Signals, ...]] = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, directory: str | None = None, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"Preemption every is {every}; it must be at least 1.")
        self.directory, self.every = directory, every
        self._asked = False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning registers its handlers right before training starts, and in its teardown puts back what was there
        # before. Put back earlier, Lightning's would meet a second signal while the ranks are on their way out.
        for number in self.SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self._asked = True
        stop_signal.note()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Several ranks save together, and the others may be waiting for this one: their last checkpoint counts.
        if isinstance(exception, StopAsked) and exception.between_updates and trainer.world_size == 1:
            self._save(trainer)
            exception.code = EXIT_PREEMPTED

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % self.every or not any_rank(self._asked):
            return
        self._save(trainer)
        raise Preempted

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:
            return
        path = self._directory(trainer) / f"preempted-step={trainer.global_step}{SUFFIX}"
        earlier = [p for p in path.parent.glob(f"preempted-step=*{SUFFIX}") if p.name != path.name]
        trainer.save_checkpoint(path)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, RunCheckpoint) and callback.dirpath and Path(callback.dirpath) == path.parent:
                callback.point_last_to(trainer, str(path))
        for old in earlier:
            trainer.strategy.remove_checkpoint(old)
        rank_zero_info(f"Preempted: saved '{path}'. Start again with --ckpt_path last.")

    def _directory(self, trainer: Trainer) -> Path:
        if self.directory is not None:
            return Path(self.directory)
        known = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
        return Path(known[0] if known else Path(trainer.default_root_dir) / "checkpoints")
