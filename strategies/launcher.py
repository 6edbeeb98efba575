"""What a rank owes to the program that launched it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

#: that torchrun launched this process
_TORCHRUN = "TORCHELASTIC_RUN_ID"
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
