"""Rewards that score elsewhere, and the event loop where their requests go on while the trainer computes."""

from __future__ import annotations

import asyncio
import contextvars
import os
import queue
import threading
from abc import abstractmethod
from collections.abc import Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from flow_rl.rewards.asking import ask
from flow_rl.rewards.base import Reward, Samples
from flow_rl.rewards.faults import select
from flow_rl.stop_signal import wait_for

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
            return wait_for(future)
        except BaseException:  # Ctrl-C while waiting: don't leave the requests running
            future.cancel()
            raise


class ThreadedReward(AsyncReward):
    """A blocking reward that scores in a thread of its own while the trainer computes.

    Of use for one that waits: for a program of its own, another device, the network. One that computes in this process
    gains nothing by it, as both share the processor. Batches are scored one after another, in order.

    Args:
        reward: the scorer.
    """

    def __init__(self, reward: Reward) -> None:
        if isinstance(reward, AsyncReward):
            raise ValueError(f"{type(reward).__name__} scores in the background already: use it as it is.")
        self.reward = reward
        self._waiting: queue.SimpleQueue[tuple[Samples, Future[Tensor], contextvars.Context]] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None

    @override
    def submit(self, samples: Samples) -> Future[Tensor]:
        """Begin to score a batch and return at once; see `AsyncReward.submit`."""
        future: Future[Tensor] = Future()
        kept = select(samples, range(len(samples)))  # a copy
        self._waiting.put((kept, future, contextvars.copy_context()))  # the context knows the reward's name
        if self._worker is None or not self._worker.is_alive():  # not alive in the child of a fork
            # A daemon: a reward that never returns must not keep a run that was interrupted from ending.
            self._worker = threading.Thread(target=self._run, daemon=True, name="reward")
            self._worker.start()
        return future

    @override
    def statistics(self) -> dict[str, float]:
        """The reward's own."""
        return self.reward.statistics()

    def _run(self) -> None:
        torch.set_flush_denormal(True)  # as train.py does; the flag is a thread's own
        with torch.no_grad():
            while True:
                samples, future, context = self._waiting.get()
                if not future.set_running_or_notify_cancel():
                    continue
                try:
                    future.set_result(context.run(ask, self.reward, samples, "init_args.reward", section=None))
                except BaseException as error:  # whoever waits gets it
                    future.set_exception(error)


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
