"""Which phase of a step runs, and how long each took: what progress bars and timers read."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class PhaseClock:
    """Accumulates wall-clock seconds by phase.

    Attributes:
        current: name of the phase that runs now; empty between phases.
        images: images made since the last `drain`.
    """

    def __init__(self) -> None:
        self.current = ""
        self.images = 0
        self._seconds: dict[str, float] = {}
        self._listeners: list = []

    def listen(self, listener) -> None:
        """Call `listener(phase)` whenever a phase starts."""
        self._listeners.append(listener)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Everything inside the block counts to `name`."""
        self.current, start = name, time.perf_counter()
        for listener in self._listeners:
            listener(name)
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
            self.current = ""

    def drain(self) -> tuple[dict[str, float], int]:
        """Seconds by phase and images since the last call; starts anew."""
        taken = self._seconds, self.images
        self._seconds, self.images = {}, 0
        return taken
