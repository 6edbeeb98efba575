from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from flow_rl.evaluation.arena import bradley_terry, expected_win_rate, ratings_of_many
from flow_rl.evaluation.battles import (
    LOSS,
    TIE,
    WIN,
    Battle,
    PairwiseJudge,
    RewardJudge,
    battles_from_values,
    credits,
    rate,
    rate_by_category,
    read_battles,
    write_battles,
)
from flow_rl.rewards.base import Reward, Samples

# The 1987 American League season (Agresti, "Categorical Data Analysis", the chapter on paired comparisons): games won
# by the row's team against the column's, and the book's fitted log-strengths relative to the last.
TEAMS = ("Milwaukee", "Detroit", "Toronto", "New York", "Boston", "Cleveland", "Baltimore")
SEASON = np.array(
    [
        [0, 7, 9, 7, 7, 9, 11],
        [6, 0, 7, 5, 11, 9, 9],
        [4, 6, 0, 7, 7, 8, 12],
        [6, 8, 6, 0, 6, 7, 10],
        [6, 2, 6, 7, 0, 7, 12],
        [4, 4, 5, 6, 6, 0, 6],
        [2, 4, 1, 3, 1, 7, 0],
    ]
)
PUBLISHED = np.array([1.58, 1.44, 1.29, 1.25, 1.11, 0.68, 0.0])


def test_agrees_with_published_strengths():
    elo = bradley_terry(SEASON).elo
    assert (elo - elo[-1]) * np.log(10) / 400 == pytest.approx(PUBLISHED, abs=0.006)


def _optimized(wins: np.ndarray) -> np.ndarray:
    """Ratings by a general optimizer."""

    def negative_log_likelihood(strength: np.ndarray) -> float:
        return (wins * np.logaddexp(0, strength[None, :] - strength[:, None])).sum() + strength.sum() ** 2

    return 1000 + 400 / np.log(10) * minimize(negative_log_likelihood, np.zeros(len(wins)), tol=1e-12).x


def test_agrees_with_a_general_optimizer():
    wins = np.array([[0, 3.5, 9], [5.5, 0, 1], [2, 6, 0]])
    assert bradley_terry(wins).elo == pytest.approx(_optimized(wins), abs=0.01)
    assert ratings_of_many(wins[None], prior=1e-9)[0] == pytest.approx(_optimized(wins), abs=0.01)


def test_many_at_once_agree_with_a_general_optimizer_even_where_one_wins_everything():
    rng = np.random.default_rng(0)
    wins = rng.integers(0, 30, (6, 4, 4)).astype(float)
    wins[0], wins[0, 0, :] = 0.0, 50.0
    wins[:, range(4), range(4)] = 0
    met = np.ones((4, 4)) - np.eye(4)
    for found, one in zip(ratings_of_many(wins, prior=0.5), wins, strict=True):
        assert found[0] == pytest.approx(_optimized(one + 0.25 * met)[0], abs=0.05)
        assert found == pytest.approx(bradley_terry(one + 0.25 * met).elo, abs=1e-4)


def _play(rng: np.random.Generator, elo: np.ndarray, prompts: int, *, taste: float = 0.0) -> list[Battle]:
    """Every pair once a prompt; prompts like models differently, by a normal number of `taste` Elo points."""
    battles = []
    for prompt in range(prompts):
        here = elo + taste * rng.standard_normal(len(elo))
        for i in range(len(elo)):
            for j in range(i + 1, len(elo)):
                won = rng.random() < expected_win_rate(here[i] - here[j])
                credit = 0.5 if rng.random() < 0.1 else float(won)
                battles.append(
                    Battle(prompt=prompt, category="xy"[prompt % 2], first=f"{i}", second=f"{j}", credit=credit)
                )
    return battles


@pytest.mark.slow
def test_planted_ratings_lie_in_intervals_that_are_resampled_by_prompt():
    # 1,000 battles: 5 models meet pairwise on 100 prompts. None of them is a tie: ties draw ratings together.
    planted = np.array([1120.0, 1050.0, 1000.0, 950.0, 880.0])
    rng, inside = np.random.default_rng(0), []
    for repeat in range(200):
        wins = np.zeros((100, 5, 5))
        for i in range(5):
            for j in range(i + 1, 5):
                wins[:, i, j] = rng.random(100) < expected_win_rate(planted[i] - planted[j])
                wins[:, j, i] = 1 - wins[:, i, j]
        battles = [
            Battle(prompt=p, category="x", first=f"{i}", second=f"{j}", credit=wins[p, i, j])
            for p in range(100) for i in range(5) for j in range(i + 1, 5)
        ]  # fmt: skip
        ratings = rate(battles, resamples=200, seed=repeat)
        inside.append([ratings[f"{i}"].low <= planted[i] <= ratings[f"{i}"].high for i in range(5)])
    assert 0.93 <= np.mean(inside) <= 0.97


def test_prompts_with_a_taste_widen_the_intervals():
    # Four battles of each pair on each prompt, all of one taste: independent battles would look twice as sure.
    rng = np.random.default_rng(1)
    together, apart = [], []
    for prompt in range(60):
        likes = rng.standard_normal() * 400
        for repeat in range(4):
            credit = float(rng.random() < expected_win_rate(likes))
            battle = {"category": "x", "first": "a", "second": "b", "credit": credit}
            together.append(Battle(prompt=prompt, **battle))
            apart.append(Battle(prompt=4 * prompt + repeat, **battle))
    one, other = rate(together)["a"], rate(apart)["a"]
    assert one.elo == pytest.approx(other.elo)
    assert (one.high - one.low) > 1.25 * (other.high - other.low)


def test_ratings_are_centred_and_keep_the_order_of_names():
    ratings = rate(_play(np.random.default_rng(2), np.array([1100.0, 900.0, 1000.0]), 60), names=["2", "0", "1"])
    assert list(ratings) == ["2", "0", "1"]
    assert np.mean([r.elo for r in ratings.values()]) == pytest.approx(1000)
    assert ratings["0"].low > ratings["1"].high


def test_categories_are_rated_apart():
    battles = [
        Battle(prompt=p, category="xy"[p % 2], first="a", second="b", credit=float(p % 2 == 0)) for p in range(40)
    ]
    by_category = rate_by_category(battles, names=["a", "b"])
    assert by_category["x"]["a"].elo > 1300 > 700 > by_category["y"]["a"].elo
    assert rate(battles, names=["a", "b"])["a"].elo == pytest.approx(1000)


def test_scores_become_battles_with_a_tie_band():
    values = {"base": np.array([[10.0, 50.0], [np.nan, 20.0]]), "student": np.array([[30.0, 51.0], [40.0, 15.0]])}
    battles = battles_from_values(values, ids=[7, 9], categories=["x", "y"], tie_band=2.0)
    assert [(b.prompt, b.category, b.credit) for b in battles] == [(7, "x", 0.0), (7, "x", 0.5), (9, "y", 1.0)]
    assert {(b.first, b.second) for b in battles} == {("base", "student")}


class _Mean(Reward):
    def score(self, samples: Samples) -> Tensor:
        return 1 + 4 * samples.images.mean(dim=(1, 2, 3))


class _First(PairwiseJudge):
    """Prefers whatever comes first, but where the second image is white."""

    def compare(self, first: Samples, second: Samples) -> Tensor:
        return torch.where(second.images.mean(dim=(1, 2, 3)) == 1, LOSS, WIN)


def _samples(*levels: float) -> Samples:
    images = torch.stack([torch.full((3, 2, 2), level) for level in levels])
    return Samples(images=images, prompts=["p"] * len(levels), categories=["x"] * len(levels))


def test_a_pointwise_reward_judges_by_the_difference():
    first, second = _samples(0.9, 0.5, 0.2), _samples(0.1, 0.52, 0.9)
    judge = RewardJudge(_Mean(), tie_band=0.25)
    assert judge.compare(first, second).tolist() == [WIN, TIE, LOSS]
    assert credits(judge, first, second).tolist() == [1.0, 0.5, 0.0]


def test_both_orders_cancel_a_judge_that_prefers_the_first():
    assert credits(_First(), _samples(0.3, 0.3, 1.0), _samples(0.6, 1.0, 0.6)).tolist() == [0.5, 0.0, 1.0]


def test_an_image_that_cannot_be_scored_has_no_battle():
    found = RewardJudge(_Mean()).compare(_samples(float("nan"), 0.5), _samples(0.5, 0.5))
    assert found.isnan().tolist() == [True, False]


def test_battles_survive_the_file(tmp_path):
    battles = _play(np.random.default_rng(3), np.array([1000.0, 1100.0]), 5)
    write_battles(battles, tmp_path / "battles.jsonl")
    assert read_battles(tmp_path / "battles.jsonl") == battles
    with (tmp_path / "battles.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": 3}) + "\n")
    with pytest.raises(ValueError, match="line 6: expected an object with prompt"):
        read_battles(tmp_path / "battles.jsonl")
    with pytest.raises(ValueError, match=r"No file .*none\.jsonl"):
        read_battles(tmp_path / "none.jsonl")


def test_bad_battles_and_judges_are_named():
    battle = {"prompt": 0, "category": "x", "first": "a", "second": "b", "credit": 1.0}
    with pytest.raises(ValueError, match="cannot battle itself"):
        Battle(**(battle | {"second": "a"}))
    with pytest.raises(ValueError, match=r"received 1\.5"):
        Battle(**(battle | {"credit": 1.5}))
    with pytest.raises(ValueError, match="no battles"):
        rate([])
    with pytest.raises(ValueError, match="at least 2 prompts"):
        rate([Battle(**battle)])
    with pytest.raises(ValueError, match=r"the models are \['a', 'c'\]"):
        rate([Battle(**battle)], names=["a", "c"])
    with pytest.raises(ValueError, match="0 or more"):
        RewardJudge(_Mean(), tie_band=-1)
    other = Samples(images=torch.zeros(1, 3, 2, 2), prompts=["q"], categories=["x"])
    with pytest.raises(ValueError, match="same prompts"):
        credits(_First(), _samples(0.5), other)
