"""Rewards that score elsewhere, and the event loop where their requests go on while the trainer computes."""

from __future__ import annotations

import asyncio
import os
import threading
from abc import abstractmethod
from collections.abc import Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
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


_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_process = 0


def run_in_background(coroutine: Coroutine[Any, Any, T]) -> Future[T]:
    """Start a coroutine in the event loop of the process, in a daemon thread that starts with the first one.

    One loop serves every reward: they wait for networks, and hardly compute.
    """
    return asyncio.run_coroutine_threadsafe(coroutine, _running_loop())


def _running_loop() -> asyncio.AbstractEventLoop:
    global _loop, _process
    with _lock:
        if _loop is None or _process != os.getpid():  # threads do not survive a fork
            _loop, _process = asyncio.new_event_loop(), os.getpid()
            # Images are encoded here, one thread a core: with more, the first request would be ready when the last is.
            _loop.set_default_executor(ThreadPoolExecutor(os.cpu_count() or 1, "rewards-encode"))
            threading.Thread(target=_loop.run_forever, daemon=True, name="rewards").start()
        return _loop
