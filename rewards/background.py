"""An event loop in a thread of its own: network traffic goes on while the trainer computes."""

from __future__ import annotations

import asyncio
import os
import threading
from abc import abstractmethod
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from torch import Tensor
from typing_extensions import override

from rewards.base import Reward, Samples

T = TypeVar("T")


class AsyncReward(Reward):
    """A reward that scores elsewhere: several batches may be under way at a time."""

    @abstractmethod
    def submit(self, samples: Samples) -> Future[Tensor]:
        """Begin to score a batch and return at once.

        The images are copied before it returns, so the caller may overwrite them. Cancelling the future gives up the
        requests that are still under way.

        Args:
            samples: images with their prompts, N of them.

        Returns:
            what `score` would return, or the exception it would raise.
        """

    @override
    def score(self, samples: Samples) -> Tensor:
        """Score a batch and wait for it."""
        future = self.submit(samples)
        try:
            return future.result()
        except BaseException:  # Ctrl-C while waiting: don't leave the requests running
            future.cancel()
            raise


class BackgroundLoop:
    """Runs coroutines in a daemon thread, which starts with the first one.

    A copy, pickled or forked, starts a thread of its own.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[BackgroundLoop], tuple[()]]:
        return BackgroundLoop, ()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine in the thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._running_loop())

    def stop(self) -> None:
        """End the thread; what still runs in it is abandoned. A later `run` starts another."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is not None and self._process == os.getpid():
            loop.call_soon_threadsafe(loop.stop)

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None or self._process != os.getpid():
                self._loop = asyncio.new_event_loop()
                self._process = os.getpid()
                threading.Thread(target=_run_until_stopped, args=(self._loop,), daemon=True, name="rewards").start()
            return self._loop


def _run_until_stopped(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        pending = asyncio.all_tasks(loop)
        for task in pending:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        loop.close()
