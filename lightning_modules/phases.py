"""Which phase of a step runs, and how long each took: what progress bars and timers read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class PhaseClock:
    """Accumulates wall-clock seconds by phase; a phase inside another stops the other's time.

    Attributes:
        current: name of the phase that runs now; empty between phases.
        images: images made since the last `drain`.
    """

    def __init__(self) -> None:
        self.current = ""
        self.images = 0
        self._since = 0.0
        self._seconds: dict[str, float] = {}
        self._listeners: list[Callable[[str], None]] = []

    def listen(self, listener: Callable[[str], None]) -> None:
        """Call `listener(phase)` whenever a phase starts or goes on."""
        self._listeners.append(listener)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Everything inside the block counts to `name`, but for what inner phases take."""
        outer = self.current
        self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, name: str) -> None:
        now = time.perf_counter()
        if self.current:
            self._seconds[self.current] = self._seconds.get(self.current, 0.0) + now - self._since
        self.current, self._since = name, now
        if name:
            for listener in self._listeners:
                listener(name)

    def drain(self) -> tuple[dict[str, float], int]:
        """Seconds by phase and images since the last call; starts anew."""
        taken = self._seconds, self.images
        self._seconds, self.images = {}, 0
        return taken
