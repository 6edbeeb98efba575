"""Whether somebody asked this process to stop, for whoever waits for something outside of it.

A signal's handler notes it here, and the running iteration may still finish. A wait ends once the request is older than
`PATIENCE_S`: what it waits for may never come.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")
#: seconds that a wait may still take after a stop was requested
PATIENCE_S = 10.0
#: seconds between two looks at the request
_POLL_S = 0.2
#: exit status of a process that SIGTERM ended
EXIT_TERMINATED = 143

_asked_at: float | None = None


class StopAsked(SystemExit):
    """Ends the process because it was asked to stop while it waited.

    Attributes:
        between_updates: the weights are those of the last whole iteration, so they may be saved.
    """

    between_updates = False

    def __init__(self) -> None:
        super().__init__(EXIT_TERMINATED)


def note() -> None:
    """Remember that a stop was asked for. May be called in a signal handler."""
    global _asked_at
    _asked_at = _asked_at or time.monotonic()


def forget() -> None:
    """A new run begins in this process."""
    global _asked_at
    _asked_at = None


def asked() -> bool:
    """Whether a stop was asked for."""
    return _asked_at is not None


def wait_for(future: Future[T]) -> T:
    """The result of a future; gives it up, and cancels it, some time after a stop was asked for.

    Raises:
        StopAsked: it was given up.
        Exception: what the future raised.
    """
    while not future.done():
        try:
            return future.result(timeout=_POLL_S)
        except TimeoutError:  # ours, or one that the future raised: then it is done
            if not future.done() and _asked_at is not None and time.monotonic() - _asked_at > PATIENCE_S:
                future.cancel()
                raise StopAsked from None
    return future.result()
