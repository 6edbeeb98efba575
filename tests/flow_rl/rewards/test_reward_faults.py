"""The fault policy around rewards of this process, and composites of rewards."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
import torch
from torch import Tensor

from flow_rl.rewards import Reward, Samples
from flow_rl.rewards.background import AsyncReward
from flow_rl.rewards.composite import CompositeReward, Part
from flow_rl.rewards.contract import ScoringRaised
from flow_rl.rewards.faults import FaultPolicy, GuardedReward, RewardFailure, select
from tests.flow_rl.rewards.loopback import Corner, uint8_samples

NAN = float("nan")


class Listed(Reward):
    """Answers one list after the other, and remembers what it was asked."""

    def __init__(self, *answers: list[float]) -> None:
        self.answers = list(answers)
        self.asked: list[list[str]] = []

    def score(self, samples: Samples) -> Tensor:
        self.asked.append(list(samples.prompts))
        return torch.tensor(self.answers.pop(0))


def samples(count: int) -> Samples:
    return uint8_samples(count, prompts=[str(i) for i in range(count)])


def test_what_fails_is_asked_once_more_by_itself() -> None:
    inner = Listed([1.0, NAN, 3.0, float("inf")], [2.0, NAN])
    reward = GuardedReward(inner, "listed")
    scores = reward.score(samples(4))
    assert scores[:3].tolist() == [1.0, 2.0, 3.0]
    assert scores[3].isnan()
    assert inner.asked == [["0", "1", "2", "3"], ["1", "3"]]
    statistics = reward.statistics()
    assert statistics["parse_rate"] == 0.5
    assert statistics["mask_rate"] == 0.25
    assert statistics["latency_s"] >= 0
    assert reward.statistics() == {}


def test_masks_by_rule_are_not_asked_again_but_infinities_are() -> None:
    inner = Listed([NAN, float("-inf"), 3.0], [2.0])
    reward = GuardedReward(inner, "face", FaultPolicy(nan_is_failure=False))
    assert reward.score(samples(3))[1:].tolist() == [2.0, 3.0]
    assert inner.asked[1] == ["1"]


def test_the_share_is_of_the_last_samples() -> None:
    """12.5 % of at least 16 samples may fail: two are let pass at the start, and again once the first are forgotten."""
    bad, good = [NAN, 3.0, 3.0, 3.0], [3.0] * 4
    policy = FaultPolicy(max_failing_share=0.125, window=16)
    answers: list[list[float]] = []
    for batch in [bad, bad, good, good, good, good, bad, bad]:
        answers += [batch, [NAN]] if batch is bad else [batch]
    reward = GuardedReward(Listed(*answers), "listed", policy)
    for _ in range(8):
        reward.score(samples(4))
    reward.reward = Listed(bad, [NAN])
    with pytest.raises(RewardFailure, match="could not score 3 of the last 20 samples") as caught:
        reward.score(samples(4))
    assert (caught.value.url, caught.value.attempts, caught.value.last_status) == (None, 2, "unparseable")


def test_a_long_batch_counts_whole() -> None:
    policy = FaultPolicy(max_failing_share=0.1, window=4)
    scores = [3.0] * 18 + [NAN, NAN]
    GuardedReward(Listed(scores, [NAN, NAN]), "listed", policy).score(samples(20))
    scores[0] = NAN
    with pytest.raises(RewardFailure, match="3 of the last 20"):
        GuardedReward(Listed(scores, [NAN] * 3), "listed", policy).score(samples(20))


def test_monitoring_turns_errors_and_shares_into_warnings() -> None:
    policy = FaultPolicy(max_failing_share=0.0, monitor_only=True)
    reward = GuardedReward(Listed(), "listed", policy)
    with pytest.warns(UserWarning, match="monitoring only"):
        assert reward.score(samples(2)).isnan().all()  # IndexError inside
    reward = GuardedReward(Listed([NAN, 2.0], [NAN]), "listed", policy)
    with pytest.warns(UserWarning, match="1 of the last 2"):
        scores = reward.score(samples(2))
    assert scores[0].isnan()
    assert scores[1] == 2.0


def test_errors_of_a_reward_are_its_own() -> None:
    with pytest.raises(ScoringRaised, match="'listed' raised IndexError: pop from empty list") as caught:
        GuardedReward(Listed(), "listed").score(samples(2))
    assert isinstance(caught.value.__cause__, IndexError)
    with pytest.raises(ValueError, match=r"shape \(1,\) for 2 samples"):
        GuardedReward(Listed([1.0]), "listed").score(samples(2))


@pytest.mark.parametrize("changes", [{"max_failing_share": 1.1}, {"max_failing_share": NAN}, {"window": 0}])
def test_bad_policies_are_refused(changes: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        FaultPolicy(**changes)


def test_select_keeps_everything_together() -> None:
    whole = uint8_samples(5, edit=True)
    part = select(whole, [3, 1])
    assert torch.equal(part.images, whole.images[[3, 1]])
    assert torch.equal(part.sources, whole.sources[[3, 1]])
    assert list(part.prompts) == [whole.prompts[3], whole.prompts[1]]


# ----------------------------------------------------------------- composites


def test_composite_is_the_weighted_mean_of_those_that_scored() -> None:
    composite = CompositeReward(
        {
            "a": Part(reward=Listed([1.0, NAN, NAN, 2.0]), weight=0.5),
            "b": Part(reward=Listed([2.0, 2.0, NAN, NAN]), weight=0.3),
            "c": Part(reward=Listed([5.0, 4.0, NAN, NAN]), weight=0.2),
        }
    )
    scores = composite.score(samples(4))
    assert scores[0] == pytest.approx(0.5 * 1 + 0.3 * 2 + 0.2 * 5)
    assert scores[1] == pytest.approx((0.3 * 2 + 0.2 * 4) / 0.5)
    assert scores[2].isnan()
    assert scores[3] == pytest.approx(2.0)


def test_parts_keep_their_own_scale_and_the_composite_stretches_it() -> None:
    composite = CompositeReward(
        {
            "narrow": Part(reward=Listed([3.0, 3.5, 4.0, 1.0, 5.0]), weight=1.0, low=3.0, high=4.0),
            "off": Part(reward=Listed([1.0] * 5), weight=0.0),
        }
    )
    parts = composite.parts(samples(5))
    assert list(parts) == ["narrow", "off"]
    assert parts["narrow"].tolist() == [3.0, 3.5, 4.0, 1.0, 5.0]
    assert composite.combine(parts).tolist() == [1.0, 3.0, 5.0, 1.0, 5.0]


def test_a_part_without_weight_never_speaks_for_the_others() -> None:
    parts = {"a": Part(reward=Listed([NAN]), weight=1.0), "off": Part(reward=Listed([4.0]), weight=0.0)}
    assert CompositeReward(parts).score(samples(1)).isnan().all()


def test_remote_parts_are_asked_before_local_ones_compute() -> None:
    order: list[str] = []

    class Far(AsyncReward):
        def submit(self, batch: Samples) -> Future[Tensor]:
            order.append("submit")
            future: Future[Tensor] = Future()
            future.set_running_or_notify_cancel()
            future.set_result(torch.full((len(batch),), 5.0))
            return future

    class Near(Corner):
        def score(self, batch: Samples) -> Tensor:
            order.append("score")
            return torch.ones(len(batch))

        def statistics(self) -> dict[str, float]:
            return {"parse_rate": 0.5}

    composite = CompositeReward({"near": Part(reward=Near(), weight=0.5), "far": Part(reward=Far(), weight=0.5)})
    assert list(composite.parts(samples(2))) == ["near", "far"]
    assert order == ["submit", "score"]
    assert composite.score(samples(2)).tolist() == [3.0, 3.0]
    assert composite.statistics() == {"near/parse_rate": 0.5}


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({}, "components is empty"),
        ({"a": {"weight": 0.5}}, "sum to 0.5"),
        ({"a": {"weight": 1.5}, "b": {"weight": -0.5}}, "non-negative"),
        ({"a": {"weight": NAN}}, "sum to nan"),
        ({"a": {"weight": 1.0, "low": 3.0, "high": 3.0}}, "components.a: low and high"),
        ({"a": {"weight": 1.0, "high": 10.0}}, "received 1 and 10"),
    ],
)
def test_bad_composites_are_refused(parts: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CompositeReward({name: Part(reward=Corner(), **fields) for name, fields in parts.items()})
