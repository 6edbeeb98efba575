"""What rewards behind an address share: requests in flight, faults, one result.

Shapes: N samples, H height, W width.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from flow_rl.rewards.background import AsyncReward, run_in_background
from flow_rl.rewards.base import Samples
from flow_rl.rewards.endpoint import Endpoint
from flow_rl.rewards.faults import FaultLog, FaultPolicy, RewardFailure, Unparseable, Unreachable, failing
from flow_rl.rewards.pixels import finite_images, quantise


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples ready to be sent.

    Attributes:
        images: uint8, shape (N, 3, H, W), on the CPU.
        prompts: one a sample.
        categories: one a sample.
        sources: uint8, shape (N, 3, H, W), on the CPU; None for text-to-image.
        finite: which samples had finite pixels only, bool, shape (N,). The others have no 8-bit form and are not sent.
    """

    images: Tensor
    prompts: Sequence[str]
    categories: Sequence[str]
    sources: Tensor | None
    finite: Tensor

    @classmethod
    def of(cls, samples: Samples) -> Batch:
        """Quantise samples; nothing of the result shares memory with them."""
        images, finite = finite_images(samples.images)
        sources = None
        if samples.sources is not None:
            sources, finite_sources = finite_images(samples.sources)
            finite &= finite_sources
        return cls(
            images=quantise(images),
            prompts=list(samples.prompts),
            categories=list(samples.categories),
            sources=None if sources is None else quantise(sources),
            finite=finite,
        )


class HttpReward(AsyncReward):
    """Splits a batch into requests, asks once more for what failed, and masks what still does.

    Subclasses say what one request is, in `ask`.

    Args:
        endpoint: whom to ask.
        name: for messages.
        samples_per_request: most samples of one request.
        faults: how many samples may fail.
    """

    #: a service that moved, or is asked differently, still gives the same scores
    not_in_fingerprint = frozenset({"endpoint", "samples_per_request", "log"})

    def __init__(self, endpoint: Endpoint, name: str, samples_per_request: int, faults: FaultPolicy) -> None:
        if samples_per_request < 1:
            raise ValueError(f"samples_per_request must be at least 1, received {samples_per_request}.")
        self.endpoint = endpoint
        self.samples_per_request = samples_per_request
        self.log = FaultLog(name, faults)

    @abstractmethod
    async def ask(self, batch: Batch, indices: list[int], attempt: int) -> list[float]:
        """Scores of some samples from one request.

        Args:
            batch: all samples.
            indices: those to ask for.
            attempt: 0, then 1 for those that failed.

        Returns:
            one a sample; not finite where it could not be scored.

        Raises:
            Unparseable: the answer cannot be read; asked for once more.
            Unreachable: there was none; the samples count as failing.
            Refused: nothing further would help; stops the run.
        """

    @override
    def submit(self, samples: Samples) -> Future[Tensor]:
        """Begin to score a batch and return at once; see `AsyncReward.submit`."""
        return run_in_background(self._score(Batch.of(samples)))

    @override
    def statistics(self) -> dict[str, float]:
        """Parse rate, mask rate, mean latency of a request in seconds, and retries, since the last call."""
        return self.log.statistics()

    def close(self) -> None:
        """Close the connections; a later batch opens new ones."""
        run_in_background(self.endpoint.close()).result(timeout=10)

    async def _score(self, batch: Batch) -> Tensor:
        scores = torch.full(batch.finite.shape, torch.nan)
        unreachable: set[int] = set()
        try:
            indices = batch.finite.nonzero().flatten().tolist()
            await self._ask_all(batch, indices, scores, unreachable, attempt=0)
            first = failing(scores, self.log.policy)
            again = [i for i in indices if first[i] and i not in unreachable]
            await self._ask_all(batch, again, scores, unreachable, attempt=1)
        except Exception as failure:  # whatever it is, monitoring must not end a run; `stop` raises it otherwise
            self.log.stop(failure)
            scores = torch.full_like(scores, torch.nan)
            self.log.scored(scores, parsed=0, failed=len(scores))
            return scores
        bad = failing(scores, self.log.policy)
        bad[list(unreachable)] = True
        scores = scores.where(scores.isfinite(), torch.nan)
        self.log.check(int(bad.sum()), len(scores))
        self.log.scored(scores, parsed=len(scores) - int(first.sum()), failed=int(bad.sum()))
        return scores

    async def _ask_all(
        self, batch: Batch, indices: list[int], scores: Tensor, unreachable: set[int], *, attempt: int
    ) -> None:
        """Ask for some samples, many requests at a time, and write what comes into `scores`.

        The first failure that stops the run gives up the other requests.
        """

        async def one(part: list[int]) -> None:
            try:
                scores[part] = torch.tensor(await self.ask(batch, part, attempt), dtype=torch.float32)
                if count := int(failing(scores[part], self.log.policy).sum()):
                    message = f"could not score {count} of the {len(part)} samples of a request."
                    self.log.last_failure = self.endpoint.failure(message, RewardFailure, attempts=attempt + 1)
            except Unparseable as error:
                message = f"sent what cannot be read: {error}"
                self.log.last_failure = self.endpoint.failure(message, RewardFailure, attempts=attempt + 1)
            except Unreachable as failure:
                self.log.last_failure = failure
                unreachable.update(part)
                # Enough to know how this batch will end: don't wait for every other request to fail as slowly.
                if not self.log.policy.monitor_only:
                    self.log.check(len(unreachable), len(scores))

        size = self.samples_per_request
        tasks = [asyncio.create_task(one(indices[i : i + size])) for i in range(0, len(indices), size)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
