"""Dynamic batching: samples of many requests are scored together, in one worker thread.

While a batch is being scored the next one gathers. Rewards promise that a score does not depend on the other samples
of its batch, so merging changes the throughput and nothing else.

Shapes: N samples, H height, W width.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flow_rl.rewards.asking import ask
from flow_rl.rewards.base import Reward, Samples
from flow_rl.rewards.pixels import dequantise
from flow_rl.rewards.surroundings import computes_alone

#: what a batch has in common: reward, shape of the images, shape of the sources
Key = tuple[str, tuple[int, ...], tuple[int, ...] | None]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample on its way to a reward; images are uint8, shape (3, H, W), a quarter of their size as floats."""

    image: Tensor
    prompt: str
    category: str
    source: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class _Waiting:
    sample: Sample
    request: int
    since: float
    score: asyncio.Future[float] = field(repr=False)


class DynamicBatcher:
    """Merges samples of the same reward and size up to `max_batch`, waiting at most `max_wait_ms` for them.

    Args:
        rewards: by name.
        max_batch: most samples scored at a time.
        max_pixels: of their images and sources together; one sample may have more.
        max_wait_ms: how long the oldest sample waits for company while the worker is idle.
    """

    def __init__(self, rewards: Mapping[str, Reward], *, max_batch: int, max_pixels: int, max_wait_ms: float) -> None:
        self.rewards = rewards
        self.max_batch = max_batch
        self.max_pixels = max_pixels
        self.max_wait_s = max_wait_ms / 1000
        self._queues: dict[Key, deque[_Waiting]] = {}
        self._arrived = asyncio.Event()
        self._worker: ThreadPoolExecutor | None = None
        self._task: asyncio.Task[None] | None = None
        self._running_since: float | None = None
        self._requests = 0

    def start(self) -> None:
        """Begin to score; call it inside the event loop."""
        self._worker = ThreadPoolExecutor(1, "rewards", initializer=_prepare)
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Stop scoring; whoever still waits gets an error."""
        assert self._task is not None, "stop() before start()"
        assert self._worker is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        for queue in self._queues.values():
            _abandon(queue)
        self._queues.clear()
        self._worker.shutdown(wait=False, cancel_futures=True)

    @property
    def alive(self) -> bool:
        """Whether samples are still taken from the queue."""
        return self._task is not None and not self._task.done()

    @property
    def queued(self) -> int:
        """Samples that wait."""
        return sum(len(queue) for queue in self._queues.values())

    @property
    def running_s(self) -> float:
        """Seconds since the running batch began; 0 when idle."""
        return 0.0 if self._running_since is None else time.monotonic() - self._running_since

    async def score(self, reward: str, samples: Sequence[Sample]) -> list[float]:
        """Scores of one request's samples, in order.

        Cancelling the call takes the samples that still wait out of the queue.

        Raises:
            Exception: what the reward raised.
        """
        self._requests += 1
        loop, now = asyncio.get_running_loop(), time.monotonic()
        waiting = [_Waiting(sample=s, request=self._requests, since=now, score=loop.create_future()) for s in samples]
        for entry in waiting:
            source = entry.sample.source
            key = (reward, tuple(entry.sample.image.shape), None if source is None else tuple(source.shape))
            self._queues.setdefault(key, deque()).append(entry)
        self._arrived.set()
        try:
            return list(await asyncio.gather(*(entry.score for entry in waiting)))
        finally:
            for entry in waiting:
                entry.score.cancel()

    async def _run(self) -> None:
        while True:
            key, batch = await self._next_batch()
            self._running_since = time.monotonic()
            try:
                await self._score_batch(key[0], batch)
            finally:
                self._running_since = None
                _abandon(batch)

    async def _next_batch(self) -> tuple[Key, list[_Waiting]]:
        """The queue whose head is oldest, once it is full or its head has waited long enough."""
        while True:
            self._arrived.clear()
            for key in list(self._queues):
                self._queues[key] = deque(w for w in self._queues[key] if not w.score.done())
                if not self._queues[key]:
                    del self._queues[key]
            if not self._queues:
                await self._arrived.wait()
                continue
            key = min(self._queues, key=lambda k: self._queues[k][0].since)
            queue = self._queues[key]
            patience = self.max_wait_s - (time.monotonic() - queue[0].since)
            most = min(self.max_batch, max(1, self.max_pixels // _pixels(key)))
            if len(queue) >= most or patience <= 0:
                return key, [queue.popleft() for _ in range(min(len(queue), most))]
            try:
                await asyncio.wait_for(self._arrived.wait(), patience)
            except TimeoutError:
                continue

    async def _score_batch(self, name: str, batch: list[_Waiting]) -> None:
        try:
            scores = await self._in_worker(name, batch)
        except Exception as error:  # whatever the reward raises is its requests' error, and not the service's end
            requests = dict.fromkeys(w.request for w in batch)
            if len(requests) > 1:  # one request's sample must not fail those it happened to be merged with
                for request in requests:
                    await self._score_batch(name, [w for w in batch if w.request == request])
                return
            for waiting in batch:
                if not waiting.score.done():
                    waiting.score.set_exception(error)
            return
        for waiting, score in zip(batch, scores, strict=True):
            if not waiting.score.done():
                waiting.score.set_result(score)

    async def _in_worker(self, name: str, batch: list[_Waiting]) -> list[float]:
        samples = [waiting.sample for waiting in batch]
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, _score, name, self.rewards[name], samples)


def _prepare() -> None:
    # As train.py does, so that a score is the same in the service and in the trainer; the flag is a thread's own.
    torch.set_flush_denormal(True)
    computes_alone()


def _pixels(key: Key) -> int:
    """Of a sample's image and source."""
    _, image, source = key
    return math.prod(image[1:]) + (0 if source is None else math.prod(source[1:]))


def _abandon(batch: Iterable[_Waiting]) -> None:
    """Whoever has no score by now won't get one: nobody may wait for ever."""
    for waiting in batch:
        if not waiting.score.done():
            waiting.score.set_exception(RuntimeError("The scoring service is shutting down."))


def _score(name: str, reward: Reward, batch: Sequence[Sample]) -> list[float]:
    """Scores of a batch as floats, NaN where one is not finite."""
    sources = [s.source for s in batch if s.source is not None]
    samples = Samples(
        images=dequantise([s.image for s in batch]),
        prompts=[s.prompt for s in batch],
        categories=[s.category for s in batch],
        sources=dequantise(sources) if sources else None,
    )
    scores = ask(reward, samples, name, section="rewards", infinities=True)
    return [score if math.isfinite(score) else math.nan for score in scores.tolist()]
