"""Which phase of a step runs, and how long each took: what progress bars and timers read."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, cast

import torch


class Mark(Protocol):
    """A moment whose distance to a later one can be read once both are over."""

    def query(self) -> bool:
        """Tell whether it is over."""
        ...

    def synchronize(self) -> None:
        """Wait until it is over."""
        ...

    def elapsed_time(self, later: Mark) -> float:
        """Milliseconds from this moment to a later one."""
        ...


class HostMark:
    """A moment on the host's clock."""

    def __init__(self) -> None:
        self.seconds = time.perf_counter()

    def query(self) -> bool:
        """See `Mark.query`."""
        return True

    def synchronize(self) -> None:
        """See `Mark.synchronize`."""

    def elapsed_time(self, later: Mark) -> float:
        """See `Mark.elapsed_time`."""
        assert isinstance(later, HostMark), "marks are compared on one clock"
        return (later.seconds - self.seconds) * 1000


def device_mark() -> Mark:
    """A moment on the current CUDA stream: when the device has done all work that was queued there until now."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return cast(Mark, event)  # torch's stubs take an Event of their own for the later one


class PhaseClock:
    """Accumulates seconds by phase; a phase inside another stops the other's time.

    On a CPU the seconds are those of the wall clock. On a GPU the host runs ahead: when it leaves the rollout, most of
    the rollout is still queued, and the wall clock would book it under whatever phase waits for the device first. So
    each change of phase records a CUDA event on the current stream, and `drain` reads the seconds between the events.
    A phase then lasts from the moment the device reaches its work until it reaches the next phase's, including the time
    that the device waits for the host, such as for a remote reward. Only `drain` waits, and only for the current
    stream: copies on other streams, such as a teacher's, keep overlapping with the work.

    Attributes:
        current: name of the phase that runs now; empty between phases.
        images: images made since the last `drain`.
        mark: makes the mark of a change of phase; see `follow`.
    """

    def __init__(self) -> None:
        self.current = ""
        self.images = 0
        self.mark: Callable[[], Mark] = HostMark
        #: changes of phase whose seconds are not counted yet: the phase that began, and when
        self._changes: deque[tuple[str, Mark]] = deque()
        self._seconds: dict[str, float] = {}
        self._listeners: list[Callable[[str], None]] = []

    def follow(self, device: torch.device) -> None:
        """Measure on the clock of the device that computes. Call it outside of any phase."""
        assert not self.current, "a phase must begin and end on one clock"
        self._changes.clear()
        self.mark = device_mark if device.type == "cuda" else HostMark

    def listen(self, listener: Callable[[str], None]) -> None:
        """Call `listener(phase)` whenever a phase starts or resumes."""
        self._listeners.append(listener)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Everything inside the block counts to `name`, except what inner phases take."""
        outer = self.current
        self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, name: str) -> None:
        self._changes.append((name, self.mark()))
        self.current = name
        # Nobody may ever drain, so what is over is counted now.
        while len(self._changes) > 1 and self._changes[1][1].query():
            self._count_first()
        if name:
            for listener in self._listeners:
                listener(name)

    def _count_first(self) -> None:
        """Count the oldest phase that is over; its successor becomes the oldest."""
        name, start = self._changes.popleft()
        if name:
            spent = start.elapsed_time(self._changes[0][1]) / 1000
            self._seconds[name] = self._seconds.get(name, 0.0) + spent

    def drain(self) -> tuple[dict[str, float], int]:
        """Seconds by phase and images since the last call; starts anew. On a GPU it waits for the current stream."""
        if self._changes:
            self._changes[-1][1].synchronize()
        while len(self._changes) > 1:
            self._count_first()
        taken = self._seconds, self.images
        self._seconds, self.images = {}, 0
        return taken
