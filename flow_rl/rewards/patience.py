"""A reward that takes much longer than before is named, with the line that it stands at.

It is not stopped: a slow scorer and one that hangs look the same from outside.
"""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from flow_rl.rewards.base import Reward
from flow_rl.rewards.contract import Asked

#: a reward that takes longer is named, and again each time that it has taken twice as long
PATIENCE_S = 60.0
#: how many times its longest call so far a reward may take before it is named
PATIENCE_RATIO = 4.0
#: longest call so far, in seconds, by place in the config
_longest: dict[str, float] = {}


@contextmanager
def watched(asked: Asked, count: int) -> Iterator[None]:
    """Say so, from another thread, if the block takes much longer than any before."""
    done, start = watch(asked, count, thread=threading.get_ident()), time.monotonic()
    try:
        yield
    finally:
        done.set()
        took(asked, time.monotonic() - start)


def took(asked: Asked, seconds: float) -> None:
    """Remember how long a call took: the next may take as long without a word."""
    _longest[asked.place] = max(_longest.get(asked.place, 0.0), seconds)


def watch(asked: Asked, count: int, *, thread: int | None) -> threading.Event:
    """Start to watch; setting the event ends it."""
    done = threading.Event()
    patience = max(PATIENCE_S, PATIENCE_RATIO * _longest.get(asked.place, 0.0))

    def run() -> None:
        waited, limit = 0.0, patience
        while not done.wait(limit - waited):
            waited, limit = limit, 2 * limit
            frame = None if thread is None else sys._current_frames().get(thread)
            place = "" if frame is None else standing(asked.reward, _stack(frame))
            warnings.warn(
                f"Reward '{asked.name}' has been scoring {count} samples for {waited:g} s{place} ({asked.where}). "
                "Expected scores by now. The run waits; if the reward hangs, end the run and give the reward a time "
                "limit.",
                stacklevel=2,
            )

    threading.Thread(target=run, daemon=True, name="reward-watch").start()
    return done


def _stack(frame: FrameType | None) -> list[tuple[FrameType, int]]:
    """The frames of a thread, the innermost last."""
    found = []
    while frame is not None:
        found.append((frame, frame.f_lineno))
        frame = frame.f_back
    return found[::-1]


def standing(reward: Reward, frames: list[tuple[FrameType, int]]) -> str:
    """Where the reward's own file was last, or else the innermost place, as ` at FILE:LINE in FUNCTION`."""
    own = getattr(sys.modules.get(type(reward).__module__), "__file__", None)
    inside = [entry for entry in frames if entry[0].f_code.co_filename == own] or frames
    if not inside:
        return ""
    frame, line = inside[-1]
    return f" at {frame.f_code.co_filename}:{line} in {frame.f_code.co_name}"
