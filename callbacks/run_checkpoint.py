"""Lightning's ModelCheckpoint with a `last.ckpt` that is always the newest."""

from __future__ import annotations

import os
from pathlib import Path

from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from typing_extensions import override

from strategies.checkpoint_files import remove


class RunCheckpoint(ModelCheckpoint):
    """`ModelCheckpoint` whose `last.ckpt` never stays behind, whatever was resumed or copied.

    Lightning's own writes `last-v1.ckpt` where a resumed run finds a `last.ckpt` that its state does not name: after a
    run's first save, and in a copy of a run's folder. `train.py` makes this of every ModelCheckpoint of a config.
    """

    @property
    @override
    def state_key(self) -> str:
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    @override
    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if trainer.fast_dev_run:  # under manual optimization Lightning's own saves in a trial run as well
            return
        versioned, self._enable_version_counter = self._enable_version_counter, False
        try:
            super()._save_last_checkpoint(trainer, monitor_candidates)
        finally:
            self._enable_version_counter = versioned

    @override
    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if trainer.fast_dev_run:
            return
        super()._save_checkpoint(trainer, filepath)
        # Before an older checkpoint is removed: a crash in between must not leave a link to nothing.
        self.point_last_to(trainer, filepath)

    def point_last_to(self, trainer: Trainer, filepath: str) -> None:
        """Let `last.ckpt` name a checkpoint of the same folder, where `save_last` is `link`."""
        if self.save_last != "link" or self.dirpath is None:
            return
        last = os.path.join(self.dirpath, f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")
        # A name of the user's own may have metrics in it, which is Lightning's to fill.
        if self.CHECKPOINT_NAME_LAST == type(self).CHECKPOINT_NAME_LAST:
            self._link_checkpoint(trainer, filepath, last)

    @staticmethod
    @override
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        """As Lightning's, in one step: there is always a link."""
        link = Path(linkpath)
        if trainer.is_global_zero and os.path.abspath(filepath) != os.path.abspath(link):
            if link.is_dir() and not link.is_symlink():
                remove(link)
            new = link.with_name(f".{link.name}.{os.getpid()}")
            new.unlink(missing_ok=True)
            new.symlink_to(os.path.relpath(filepath, link.parent))
            os.replace(new, link)
        trainer.strategy.barrier()
