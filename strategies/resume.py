"""Where a run goes on from: what the user asked for, or, restarted by its launcher, its own newest checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from strategies.checkpoint_files import newest_checkpoint

#: how often a launcher has started this job anew: torchrun, SLURM
_RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
#: touched in the run's directory when a job starts for the first time
_MARK = ".started"


class NothingToResumeError(ValueError):
    """`last` was asked for, and there is none."""


def restarted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this job before."""
    return any(environment.get(name, "0") not in ("", "0") for name in _RESTARTS)


def mark_start(run_directory: Path) -> None:
    """Remember when the job began: checkpoints from before are not its own."""
    (run_directory / _MARK).touch()


def checkpoint_to_resume(
    given: str | None, directories: Sequence[str | Path], run_directory: Path, *, restarted: bool
) -> str | None:
    """The checkpoint that a fit goes on from; None starts from the beginning.

    Args:
        given: what the user asked for: `last`, a path or nothing.
        directories: where the run saves.
        run_directory: of the run, where `mark_start` left its mark.
        restarted: whether this job did a part of the run already.

    Raises:
        NothingToResumeError: `last`, and no complete checkpoint.
    """
    if restarted:
        mark = run_directory / _MARK
        own = newest_checkpoint(directories, newer_than=mark.stat().st_mtime if mark.is_file() else 0.0)
        if own is not None:
            return str(own)
    if given != "last":
        return given
    newest = newest_checkpoint(directories)
    if newest is None:
        where = " or ".join(f"'{d}'" for d in directories) or "any directory, as no ModelCheckpoint has a dirpath"
        raise NothingToResumeError(
            f"--ckpt_path last: there is no complete checkpoint (*.ckpt) in {where}. Leave it out to start a new run."
        )
    return str(newest)
