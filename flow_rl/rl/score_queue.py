"""The scores of an iteration that are under way while the next images are made.

Shapes: N samples, K rewards.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from functools import partial
from types import TracebackType

import torch
from torch import Tensor

from flow_rl.rewards import Reward, Samples
from flow_rl.rewards.asking import Received, call, submit
from flow_rl.rewards.background import AsyncReward
from flow_rl.rl.objectives import Rollout
from flow_rl.rl.phases import PhaseClock
from flow_rl.rl.scoring import samples_of
from flow_rl.stop_signal import StopAsked, wait_for


class ScoreQueue:
    """Rollouts on their way through the rewards: put in as they are made, taken out in the same order with scores.

    Asynchronous rewards score while the caller makes the next rollout; the others score at once. The first one to fail
    cancels all that is under way, so that its error comes up now and not behind requests that no longer matter. Leaving
    the block cancels what is still under way.

    Args:
        rewards: by name, K of them.
        asks: whether the reward of a name is asked about a task.
        clock: counts `reward` (asking) and `reward_wait` (waiting) apart.

    Attributes:
        rollouts: all that were put in, images on the host.
    """

    def __init__(self, rewards: Mapping[str, Reward], asks: Callable[[str, str], bool], clock: PhaseClock) -> None:
        self.rewards, self.asks, self.clock = rewards, asks, clock
        self.rollouts: list[Rollout] = []
        self._columns: list[dict[str, Future[Tensor] | Received]] = []
        self._lock = threading.Lock()
        self._futures: list[Future[Tensor]] = []
        self._failure: BaseException | None = None

    def __enter__(self) -> ScoreQueue:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def put(self, rollout: Rollout) -> None:
        """Send a rollout's images to the rewards that are asked about its task, and let go of them on the device.

        Raises:
            Exception: what a reward that is not asynchronous raised, or an asynchronous one until now.
        """
        samples = samples_of(rollout.prompts.repeat_interleave(rollout.group_size), rollout.images)
        asked = [name for name in self.rewards if self.asks(name, rollout.prompts.task)]
        self._columns.append(self._submit(samples, asked))
        self.rollouts.append(rollout.release_images())

    @property
    def samples(self) -> int:
        """Samples of all rollouts that were put in."""
        return sum(len(rollout) for rollout in self.rollouts)

    def __iter__(self) -> Iterator[tuple[Rollout, Tensor]]:
        """Every rollout with its raw scores (N, K), NaN in the columns of rewards that were not asked.

        Waits for the scores of each when its turn comes.

        Raises:
            Exception: what a reward raised.
        """
        for rollout, columns in zip(self.rollouts, self._columns, strict=True):
            yield rollout, self._join(columns, len(rollout))

    def _submit(self, samples: Samples, asked: Collection[str]) -> dict[str, Future[Tensor] | Received]:
        """Begin to score."""
        columns: dict[str, Future[Tensor] | Received] = {}
        with self.clock.phase("reward"):
            for name in asked:  # the asynchronous ones first: they score while the others do
                reward = self.rewards[name]
                if isinstance(reward, AsyncReward):
                    columns[name] = self._watched(name, submit(reward, samples, name))
            for name in asked:
                if name not in columns:
                    columns[name] = call(self.rewards[name], samples, name)
            if self._failure is not None:
                raise self._failure
        return columns

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
        error = future.exception()
        with self._lock:
            first, self._failure = self._failure is None, self._failure or error
        if first and error is not None:
            error.add_note(f"Raised while reward '{name}' was scoring.")
            self.cancel()

    def _join(self, columns: Mapping[str, Future[Tensor] | Received], count: int) -> Tensor:
        joined = []
        with self.clock.phase("reward_wait"):
            for name in self.rewards:
                column = columns.get(name)
                if isinstance(column, Future):
                    joined.append(self._result(column))
                else:
                    joined.append(torch.full((count,), torch.nan) if column is None else column.result())
        return torch.stack(joined, dim=1)

    def _result(self, future: Future[Tensor]) -> Tensor:
        try:
            return wait_for(future)
        except StopAsked as stop:
            stop.between_updates = True  # gradients may have begun to add up, and no optimizer has stepped
            raise
        except CancelledError:
            if self._failure is None:
                raise
            raise self._failure from None
