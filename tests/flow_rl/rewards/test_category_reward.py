"""A reward for some categories: who is asked about what, and what is left masked."""

from __future__ import annotations

import pytest
import torch

from flow_rl.flow.advantages import group_advantages
from flow_rl.rewards import Reward, Samples
from flow_rl.rewards.category import CategoryReward
from tests.planted import Brightness


class Recorder(Reward):
    """Remembers what it was asked, and scores by place in the batch."""

    def __init__(self) -> None:
        self.asked: list[Samples] = []

    def score(self, samples: Samples) -> torch.Tensor:
        self.asked.append(samples)
        return torch.arange(1.0, len(samples) + 1)


def samples(*categories: str) -> Samples:
    images = torch.rand(len(categories), 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return Samples(images=images, prompts=[f"p{i}" for i in range(len(categories))], categories=list(categories))


def test_only_its_categories_reach_the_reward() -> None:
    inner, batch = Recorder(), samples("portrait", "plant", "portrait", "plant")
    scores = CategoryReward(inner, ["portrait"]).score(batch)
    assert scores.isnan().tolist() == [False, True, False, True]
    assert scores[[0, 2]].tolist() == [1.0, 2.0]
    [asked] = inner.asked
    assert asked.prompts == ["p0", "p2"]
    assert torch.equal(asked.images, batch.images[[0, 2]])


def test_a_batch_of_other_categories_costs_no_evaluation() -> None:
    inner = Recorder()
    assert CategoryReward(inner, ["portrait"]).score(samples("plant", "plant")).isnan().all()
    assert inner.asked == []


def test_the_other_rewards_carry_what_it_leaves_out() -> None:
    scores = torch.tensor([[1.0, torch.nan], [3.0, torch.nan]])
    weights = torch.tensor([[0.5, 0.5]]).expand(2, 2)
    masked = group_advantages(scores, torch.tensor([0, 0]), weights)
    alone = group_advantages(scores[:, :1], torch.tensor([0, 0]), torch.ones(2, 1))
    assert torch.equal(masked, alone)


def test_scores_on_disk_know_the_categories_and_the_reward() -> None:
    made = [CategoryReward(Brightness(), names).fingerprint() for names in (["a"], ["a"], ["b"])]
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize("categories", [[], "portrait"])
def test_no_list_of_categories_is_refused(categories) -> None:
    with pytest.raises(ValueError, match="list of at least one category"):
        CategoryReward(Recorder(), categories)
