"""Scores under way: what overlaps, what is cancelled, and whose error comes up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

import pytest
import torch
from torch import Tensor

from flow_rl.batches import Prompts
from flow_rl.rewards import Reward, RewardFailure, Samples
from flow_rl.rewards.background import AsyncReward, ThreadedReward
from flow_rl.rl.phases import PhaseClock
from flow_rl.rl.score_queue import ScoreQueue
from flow_rl.rl.scoring import score_safely
from tests.planted import Brightness, Broken
from tests.toy_policy import toy_rollout

#: two images of one prompt
ROLLOUT = toy_rollout(Prompts(ids=(1,), texts=("a",), categories=("x",)), 2, images=torch.full((2, 3, 4, 4), 0.5))
SAMPLES = Samples(images=torch.full((2, 3, 4, 4), 0.5), prompts=["a", "b"], categories=["x", "x"])


class ByHand(AsyncReward):
    """Answers when the test says so."""

    def __init__(self) -> None:
        self.futures: list[Future[Tensor]] = []

    def submit(self, samples: Samples) -> Future[Tensor]:
        self.futures.append(Future())
        return self.futures[-1]


class Gated(Reward):
    """Blocks until it is let go; counts its calls."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.calls = 0

    def score(self, samples: Samples) -> Tensor:
        self.calls += 1
        assert self.go.wait(30)
        return torch.full((len(samples),), 4.0)


class Raises(Reward):
    def score(self, samples: Samples) -> Tensor:
        raise RewardFailure("the service is gone")


def queue_of(*, asks: Callable[[str, str], bool] = lambda name, task: True, **rewards: Reward) -> ScoreQueue:
    return ScoreQueue(rewards, asks, PhaseClock())


def test_a_blocking_reward_scores_while_the_caller_goes_on() -> None:
    gated = Gated()
    with queue_of(gated=ThreadedReward(gated), brightness=Brightness()) as queue:
        for _ in range(2):
            queue.put(ROLLOUT)
        gated.go.set()  # only now: a reward that were waited for in `put` would have run into its time limit
        for rollout, scores in queue:
            assert rollout.prompts is ROLLOUT.prompts
            assert torch.equal(scores, torch.tensor([[4.0, 3.0], [4.0, 3.0]]))
    assert gated.calls == 2


def test_a_reward_that_is_not_asked_is_nan_and_not_called() -> None:
    gated = Gated()
    with queue_of(asks=lambda name, task: name != "gated", gated=gated, brightness=Brightness()) as queue:
        queue.put(ROLLOUT)
        [(_, scores)] = queue
    assert scores[:, 0].isnan().all()
    assert torch.equal(scores[:, 1], torch.tensor([3.0, 3.0]))
    assert gated.calls == 0


def test_the_first_failure_comes_up_and_cancels_everything_else() -> None:
    first, second = ByHand(), ByHand()
    queue = queue_of(a=first, b=second)
    queue.put(ROLLOUT)
    queue.put(ROLLOUT)
    second.futures[1].set_exception(RewardFailure("the service is gone"))
    with pytest.raises(RewardFailure, match="the service is gone") as error:
        next(iter(queue))  # its own futures never end: without the cancellation this would wait for ever
    assert any("reward 'b'" in note for note in error.value.__notes__)
    assert all(future.cancelled() for future in (*first.futures, second.futures[0]))


def test_a_failure_stops_the_next_rollout_from_being_submitted() -> None:
    reward = ByHand()
    with queue_of(a=reward) as queue:
        queue.put(ROLLOUT)
        reward.futures[0].set_exception(RewardFailure("gone"))
        with pytest.raises(RewardFailure, match="gone"):
            queue.put(ROLLOUT)


def test_an_interrupt_leaves_nothing_under_way() -> None:
    reward = ByHand()

    def interrupted() -> None:
        with queue_of(a=reward) as queue:
            queue.put(ROLLOUT)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert reward.futures[0].cancelled()


def test_a_thread_passes_on_its_error_and_goes_on() -> None:
    reward = ThreadedReward(Raises())
    for _ in range(2):
        with pytest.raises(RewardFailure, match="the service is gone"):
            reward.score(SAMPLES)


class Late(Reward):
    """Brightness as it is once the reward is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def score(self, samples: Samples) -> Tensor:
        assert self.go.wait(30)
        return Brightness().score(samples)


def test_a_thread_keeps_a_copy_of_the_images() -> None:
    late, images = Late(), torch.zeros(1, 3, 2, 2)
    future = ThreadedReward(late).submit(Samples(images=images, prompts=["a"], categories=["x"]))
    images.fill_(1.0)
    late.go.set()
    assert float(future.result(30)) == 1.0


def test_an_asynchronous_reward_needs_no_thread() -> None:
    with pytest.raises(ValueError, match="ByHand scores in the background already"):
        ThreadedReward(ByHand())


def test_waiting_is_timed_apart_from_what_it_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock, heard = PhaseClock(), []
    clock.listen(heard.append)
    with clock.phase("update"):
        now[0] += 1
        with clock.phase("reward_wait"):
            now[0] += 10
        now[0] += 2
    assert clock.drain()[0] == {"update": 3.0, "reward_wait": 10.0}
    assert heard == ["update", "reward_wait", "update"]
    assert clock.current == ""


def test_a_reward_that_is_only_watched_never_ends_a_run() -> None:
    seven = Samples(images=SAMPLES.images, prompts=["seven", "a"], categories=["x", "x"])
    with pytest.warns(UserWarning, match="for monitoring only") as warned:
        scores = score_safely({"gone": Raises(), "broken": Broken(), "brightness": Brightness()}, seven)
    assert scores[:, :2].isnan().all()  # one raised, the other left its scale
    assert torch.equal(scores[:, 2], torch.tensor([3.0, 3.0]))
    assert len(warned) == 2
