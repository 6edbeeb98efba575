"""What a rank owes to the program that launched it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping

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
