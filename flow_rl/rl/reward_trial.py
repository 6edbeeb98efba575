"""A trial call of every reward before training: what would end the run after the first rollout ends it now.

Shapes: N samples, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import torch

from flow_rl.batches import Prompts, PromptTable
from flow_rl.messages import warn_on_first_rank
from flow_rl.rewards import Reward, Samples
from flow_rl.rewards.asking import ask, statistics_of, submit
from flow_rl.rewards.background import AsyncReward
from flow_rl.rewards.faults import FaultLog, RewardFailure, Unreachable
from flow_rl.rewards.surroundings import own_random_state
from flow_rl.rl.scoring import samples_of
from flow_rl.stop_signal import wait_for

#: N at most; at least 2, so that a result of another shape shows
SAMPLES = 4
_SEED = 0


def trial_prompts(table: PromptTable) -> Prompts:
    """A few prompts of a table, of as many categories as there are: some rewards judge some of them alone."""
    first = list({category: row for row, category in reversed(list(enumerate(table.categories)))}.values())
    rows = sorted(first)[:SAMPLES]
    return table.select(rows if len(rows) > 1 else [rows[0], (rows[0] + 1) % len(table.categories)])


def trial_samples(prompts: Prompts, size: tuple[int, int], device: torch.device) -> Samples:
    """Images of noise for prompts: valid input, drawn from a generator of its own.

    Args:
        prompts: N of them.
        size: (H, W).
        device: where rewards get to see images.
    """
    generator = torch.Generator().manual_seed(_SEED)
    images = torch.rand(len(prompts), 3, *size, generator=generator).to(device)
    return samples_of(prompts.to(device), images)


def try_rewards(rewards: Mapping[str, Reward], asks: Callable[[str, str], bool], samples: Samples) -> None:
    """Let every reward that is asked about a task score a few samples of it, and forget that it did.

    No random generator moves, not even one that a reward draws from, and nothing enters the statistics of training.

    Args:
        rewards: by name.
        asks: whether the reward of a name is asked about a task.
        samples: N of them, of one task.

    Raises:
        RunStopped: a reward raised, returned what is no score, or changed the samples; or none of them could be scored
            because a service does not answer.
        StopAsked: the process was asked to stop while a service was waited for.
    """
    asked = {name: reward for name, reward in rewards.items() if asks(name, samples.task)}
    before = {name: own_random_state(reward) for name, reward in asked.items()}
    pending: dict[str, Future[Any]] = {}
    try:
        for name, reward in asked.items():
            if isinstance(reward, AsyncReward):
                pending[name] = submit(reward, samples, name)
        for name, reward in asked.items():
            try:
                wait_for(pending[name]) if name in pending else ask(reward, samples, name)
                _refuse_silent(name, reward, len(samples))
            except Exception as error:
                error.add_note(f"Raised while reward '{name}' was tried, before training.")
                raise
    finally:
        for future in pending.values():
            future.cancel()
        for name, reward in asked.items():
            statistics_of(reward, name)  # empties the counts
            before[name].restore(reward)
            for log in fault_logs(reward):
                log.forget()


def _refuse_silent(name: str, reward: Reward, count: int) -> None:
    """Stop where a service did not answer. One that answers may well find nothing to score in noise."""
    for log in fault_logs(reward):
        if not log.failed_whole or log.policy.monitor_only:
            continue
        said = f"Reward '{name}' could score none of the {count} images of noise that it was tried on before training"
        last = log.last_failure
        if isinstance(last, Unreachable):
            raise RewardFailure(
                f"{said}, as its service does not answer: {last} Start it, or set model.check_rewards=false to begin "
                "without this trial.",
                url=last.url,
                attempts=last.attempts,
                last_status=last.last_status,
            )
        warn_on_first_rank(f"{said}.{'' if last is None else f' Last failure: {last}'}")


def fault_logs(value: Any, *, depth: int = 4) -> Iterator[FaultLog]:
    """The logs of failures that a reward keeps, and those of rewards inside it."""
    if isinstance(value, FaultLog):
        yield value
    elif depth and isinstance(value, Mapping):
        for inner in value.values():
            yield from fault_logs(inner, depth=depth - 1)
    elif depth and (isinstance(value, Reward) or isinstance(getattr(value, "reward", None), Reward)):
        for inner in vars(value).values():
            yield from fault_logs(inner, depth=depth - 1)
