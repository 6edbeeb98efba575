"""What happens when a sample cannot be scored: asked once more, then NaN, and a stop when too many fail.

A failed score never becomes a number. NaN is masked by the trainer; how many samples may end that way is a setting,
and past it the run stops with the address, the number of attempts and the last status.

Shapes: N samples.
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from flow_rl.errors import RunStopped
from flow_rl.rewards.asking import ask
from flow_rl.rewards.base import Reward, Samples

#: events kept for a log that nobody reads
MAX_EVENTS = 100_000


class RewardFailure(RunStopped):
    """Scoring failed.

    Args:
        message: what happened and what to do.
        url: address of the service; None for a reward of this process.
        attempts: requests made for the samples that failed last.
        last_status: the HTTP status, or the name of the transport error, of the last attempt.
    """

    def __init__(
        self, message: str, *, url: str | None = None, attempts: int = 1, last_status: int | str | None = None
    ) -> None:
        super().__init__(message)
        self.url = url
        self.attempts = attempts
        self.last_status = last_status


class Unreachable(RewardFailure):
    """Every attempt failed in a way that might have passed: its samples are NaN, and count as failing."""


class Refused(RewardFailure):
    """The service answered what no further attempt would change: the run stops."""


class Unparseable(ValueError):
    """An answer that arrived whole and cannot be read as a score."""


@dataclass(frozen=True, kw_only=True)
class FaultPolicy:
    """How many samples may fail before a run stops."""

    max_failing_share: float = 0.1
    """Largest share of the last `window` samples that may fail; 0 stops at the first, 1 never."""
    window: int = 64
    """Samples that the share is taken over, at least: a longer batch counts whole, and before so many were seen the
    share is still of `window`."""
    nan_is_failure: bool = True
    """Ask again for NaN and count it as failing. False for rewards that mask samples by rule (a face reward where the
    source shows no face): their NaN is an answer."""
    monitor_only: bool = False
    """Never stop the run: NaN and a warning instead. For rewards that are logged and not trained on."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_failing_share <= 1:
            raise ValueError(f"max_failing_share must be from 0 to 1, received {self.max_failing_share}.")
        if self.window < 1:
            raise ValueError(f"window must be at least 1 sample, received {self.window}.")


@dataclass(frozen=True, kw_only=True)
class _Event:
    samples: int = 0
    parsed: int = 0
    masked: int = 0
    requests: int = 0
    retries: int = 0
    seconds: float = 0.0


class FaultLog:
    """Counts what failed, decides when it is too much, and sums it up for the logs.

    One thread records, another may read: events pass through a deque, whose ends are atomic.

    Args:
        name: of the reward, for messages.
        policy: how many samples may fail.
    """

    def __init__(self, name: str, policy: FaultPolicy) -> None:
        self.name = name
        self.policy = policy
        self.last_failure: RewardFailure | None = None
        self._events: deque[_Event] = deque(maxlen=MAX_EVENTS)
        self._window: deque[tuple[int, int]] = deque()

    def answered(self, seconds: float, *, retries: int = 0) -> None:
        """Note one request that was answered, its seconds from first to last attempt, and the attempts in vain."""
        self._events.append(_Event(requests=1, retries=retries, seconds=seconds))

    def check(self, failed: int, samples: int) -> None:
        """Stop if `failed` of a batch of `samples`, with those before it, are more than the policy allows.

        May be called while the batch is still being scored: the rest then counts as scored.

        Raises:
            RewardFailure: too large a share failed, and the reward is not for monitoring only.
        """
        samples_before, failed_before = (sum(column) for column in zip(*self._window, (0, 0), strict=True))
        failing, seen = failed_before + failed, samples_before + samples
        share = failing / max(seen, self.policy.window)
        if failed == 0 or share <= self.policy.max_failing_share:
            return
        last = self.last_failure
        cause = f" Last failure: {last}" if last else ""
        message = (
            f"Reward '{self.name}' could not score {failing} of the last {seen} samples ({share:.1%} of at least "
            f"{self.policy.window}; {self.policy.max_failing_share:.1%} may fail).{cause}"
        )
        self.stop(
            RewardFailure(
                message,
                url=last.url if last else None,
                attempts=last.attempts if last else 2,  # asked, and asked once more
                last_status=last.last_status if last else "unparseable",
            )
        )

    def stop(self, failure: Exception) -> None:
        """Raise, or warn where the reward is for monitoring only."""
        if not self.policy.monitor_only:
            raise failure
        warnings.warn(f"Reward '{self.name}' is for monitoring only, its scores are NaN: {failure}", stacklevel=3)

    def scored(self, scores: Tensor, *, parsed: int, failed: int) -> None:
        """Note a batch.

        Args:
            scores: final scores, shape (N,), NaN where masked.
            parsed: samples whose first answer could be read.
            failed: samples that failed for good.
        """
        masked = int(scores.isnan().sum())
        self._events.append(_Event(samples=len(scores), parsed=parsed, masked=masked))
        self._window.append((len(scores), failed))
        while sum(n for n, _ in self._window) - self._window[0][0] >= self.policy.window:
            self._window.popleft()

    @property
    def failed_whole(self) -> bool:
        """Whether every sample of the last batch failed."""
        return bool(self._window) and 0 < self._window[-1][0] == self._window[-1][1]

    def forget(self) -> None:
        """Count from nothing again."""
        self.last_failure = None
        self._events.clear()
        self._window.clear()

    def statistics(self) -> dict[str, float]:
        """Parse rate, mask rate and mean latency since the last call; empty if nothing was scored."""
        events = []
        while self._events:
            events.append(self._events.popleft())
        samples, requests = (sum(getattr(e, key) for e in events) for key in ("samples", "requests"))
        values = {}
        if samples:
            values["parse_rate"] = sum(e.parsed for e in events) / samples
            values["mask_rate"] = sum(e.masked for e in events) / samples
        if requests:
            values["latency_s"] = sum(e.seconds for e in events) / requests
            values["retries"] = float(sum(e.retries for e in events))
        return values


def failing(scores: Tensor, policy: FaultPolicy) -> Tensor:
    """Which scores (N,) count as failing, bool (N,): infinities always, NaN if the policy says so."""
    return scores.isinf() | (scores.isnan() & policy.nan_is_failure)


def select(samples: Samples, indices: Sequence[int]) -> Samples:
    """The samples at these places, in this order."""
    chosen = torch.as_tensor(indices, dtype=torch.long, device=samples.images.device)
    return Samples(
        images=samples.images[chosen],
        prompts=[samples.prompts[i] for i in indices],
        categories=[samples.categories[i] for i in indices],
        sources=None if samples.sources is None else samples.sources[chosen.to(samples.sources.device)],
    )


class GuardedReward(Reward):
    """Any reward of this process, with the policy around it.

    Args:
        reward: whom to ask.
        name: for messages and warnings.
        faults: how many samples may fail.
    """

    not_in_fingerprint = frozenset({"log"})

    def __init__(self, reward: Reward, name: str, faults: FaultPolicy = FaultPolicy()) -> None:
        self.reward = reward
        self.log = FaultLog(name, faults)

    @override
    def score(self, samples: Samples) -> Tensor:
        """Score a batch; what is not finite is asked for once more, then NaN.

        Raises:
            RewardFailure: more samples failed than the policy allows.
            Exception: what the reward itself raises, unless it is for monitoring only.
        """
        try:
            scores = self._ask(samples)
            first = failing(scores, self.log.policy)
            if first.any():
                scores[first] = self._ask(select(samples, first.nonzero().flatten().tolist()))
        except Exception as error:  # whatever it is, monitoring must not end a run; `stop` raises it otherwise
            self.log.stop(error)
            scores = torch.full((len(samples),), torch.nan)
            self.log.scored(scores, parsed=0, failed=len(samples))
            return scores
        failed = int(failing(scores, self.log.policy).sum())
        scores = scores.where(scores.isfinite(), torch.nan)
        self.log.check(failed, len(samples))
        self.log.scored(scores, parsed=len(samples) - int(first.sum()), failed=failed)
        return scores

    @override
    def statistics(self) -> dict[str, float]:
        """The policy's numbers, and the reward's own, which win."""
        return self.log.statistics() | self.reward.statistics()

    def _ask(self, samples: Samples) -> Tensor:
        start = time.perf_counter()
        scores = ask(self.reward, samples, self.log.name, section=None, setting="init_args.reward", infinities=True)
        self.log.answered(time.perf_counter() - start)
        return scores
