"""Where a run goes on from: what the user asked for, or, restarted by its launcher, its own newest checkpoint."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
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


#: that torchrun launched this process
_TORCHRUN = "TORCHELASTIC_RUN_ID"
#: for torchrun: restarted workers meet at a store of their own
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
#: prctl(2): the signal that a process gets when its parent is gone
_PR_SET_PDEATHSIG = 1


def end_with_launcher() -> None:
    """Have the kernel send SIGTERM to this worker when its torchrun is gone.

    A torchrun that is killed outright can't stop its workers: as orphans they would hold their devices and write the
    checkpoints of a run that has long been started again. What a SIGTERM does is `callbacks.Preemption`'s affair.
    On Linux, for workers of torchrun; elsewhere nothing happens.
    """
    if sys.platform != "linux" or _TORCHRUN not in os.environ:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


def warning_of_restarts(environment: Mapping[str, str] = os.environ) -> str | None:
    """What to tell the first rank of a job whose restarts may hang; None if there is nothing to say.

    torchrun keeps one store for all its restarts (torch 2.14). A restarted rank that comes first finds the address of a
    former one there, and waits for it; with gloo, past every timeout.
    """
    restarts = environment.get("TORCHELASTIC_MAX_RESTARTS", "0")
    shared = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if environment.get("RANK") != "0" or restarts in ("", "0") or not shared:
        return None
    return (
        f"torchrun --max-restarts={restarts}: restarted ranks may fail to meet, or hang, because they find the "
        f"addresses of those that are gone. Set {OWN_STORE}=1 in torchrun's environment."
    )
