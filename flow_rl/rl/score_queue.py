"""The scores of an iteration that are under way while the next images are made.

Shapes: N samples, K rewards.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import CancelledError, Future
from functools import partial
from types import TracebackType

import torch
from torch import Tensor

from flow_rl.rewards import Reward, Samples
from flow_rl.rewards.background import AsyncReward
from flow_rl.rl.phases import PhaseClock
from flow_rl.rl.scoring import checked


class PendingScores:
    """Submits samples to rewards and waits for the scores; leaving the block cancels what is still under way.

    Asynchronous rewards score while the caller goes on; the others are asked at once. The first one to fail cancels
    all that is under way, so that its error comes up now and not behind requests that no longer matter.

    Args:
        rewards: by name, K of them.
        clock: counts `reward` (asking) and `reward_wait` (waiting) apart.
    """

    def __init__(self, rewards: Mapping[str, Reward], clock: PhaseClock) -> None:
        self.rewards = rewards
        self.clock = clock
        self._lock = threading.Lock()
        self._futures: list[Future[Tensor]] = []
        self._failure: BaseException | None = None

    def __enter__(self) -> PendingScores:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def submit(self, samples: Samples, asked: Collection[str]) -> Callable[[], Tensor]:
        """Begin to score.

        Args:
            samples: N of them.
            asked: names of the rewards to ask; the columns of the others are NaN.

        Returns:
            a function that waits for the raw scores (N, K).

        Raises:
            Exception: what a reward that is not asynchronous raised, or an asynchronous one until now.
        """
        columns: dict[str, Future[Tensor] | Tensor] = {}
        with self.clock.phase("reward"):
            for name, reward in self.rewards.items():  # the asynchronous ones first: they score while the others do
                if name in asked and isinstance(reward, AsyncReward):
                    columns[name] = self._watched(name, reward.submit(samples))
            for name, reward in self.rewards.items():
                if name in asked and name not in columns:
                    columns[name] = reward.score(samples)
            if self._failure is not None:
                raise self._failure
        return partial(self._join, columns, len(samples))

    def cancel(self) -> None:
        """Give up what is still under way."""
        for future in self._futures:
            future.cancel()

    def _watched(self, name: str, future: Future[Tensor]) -> Future[Tensor]:
        self._futures.append(future)
        future.add_done_callback(partial(self._done, name))
        return future

    def _done(self, name: str, future: Future[Tensor]) -> None:
        """Runs in whatever thread ends the future."""
        if future.cancelled() or future.exception() is None:
            return
        with self._lock:
            first, self._failure = self._failure is None, self._failure or future.exception()
        if first:
            self._failure.add_note(f"Raised while reward '{name}' was scoring.")
            self.cancel()

    def _join(self, columns: Mapping[str, Future[Tensor] | Tensor], count: int) -> Tensor:
        joined = []
        with self.clock.phase("reward_wait"):
            for name in self.rewards:
                column = columns.get(name)
                if isinstance(column, Future):
                    column = self._result(column)
                joined.append(torch.full((count,), torch.nan) if column is None else checked(name, column, count))
        return torch.stack(joined, dim=1)

    def _result(self, future: Future[Tensor]) -> Tensor:
        try:
            return future.result()
        except CancelledError:
            if self._failure is None:
                raise
            raise self._failure from None
