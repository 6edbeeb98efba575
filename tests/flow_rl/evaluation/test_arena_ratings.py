import math

import numpy as np
import pytest

from flow_rl.evaluation.arena import bradley_terry, expected_win_rate


def _play(rng: np.random.Generator, elo: np.ndarray, battles: int) -> np.ndarray:
    """Wins after `battles` battles between pairs drawn uniformly."""
    models = len(elo)
    wins = np.zeros((models, models))
    pairs = [(i, j) for i in range(models) for j in range(i + 1, models)]
    for (i, j), n in zip(pairs, rng.multinomial(battles, [1 / len(pairs)] * len(pairs)), strict=True):
        wins[i, j] = rng.binomial(n, 1 / (1 + 10 ** ((elo[j] - elo[i]) / 400)))
        wins[j, i] = n - wins[i, j]
    return wins


def test_planted_ratings_lie_in_their_intervals_as_often_as_they_say():
    planted = np.array([1120.0, 1050.0, 1000.0, 950.0, 880.0])
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(400):
        ratings = bradley_terry(_play(rng, planted, 1000))
        inside.append((ratings.low <= planted) & (planted <= ratings.high))
    assert 0.93 <= np.mean(inside) <= 0.97


def test_two_models_have_a_closed_form():
    ratings = bradley_terry([[0, 75], [25, 0]], names=["a", "b"])
    log_odds, points = math.log(3.0), 400 / math.log(10)
    assert ratings.elo == pytest.approx([1000 + points * log_odds / 2, 1000 - points * log_odds / 2], abs=1e-6)
    # The variance of a log-odds is 1/75 + 1/25; either rating is half of the difference away from 1000.
    reach = 1.959964 * points * math.sqrt(1 / 75 + 1 / 25) / 2
    assert ratings.high - ratings.elo == pytest.approx([reach, reach], rel=1e-5)
    assert ratings.elo - ratings.low == pytest.approx([reach, reach], rel=1e-5)


def test_maximum_satisfies_the_likelihood_equations():
    wins = _play(np.random.default_rng(1), np.array([1400.0, 1000.0, 990.0, 610.0]), 2000) + 0.5
    np.fill_diagonal(wins, 0)
    ratings = bradley_terry(wins)
    expected = (wins + wins.T) * expected_win_rate(ratings.elo[:, None] - ratings.elo[None, :])
    assert expected.sum(axis=1) == pytest.approx(wins.sum(axis=1), rel=1e-8)
    assert ratings.elo.mean() == pytest.approx(1000)


@pytest.mark.parametrize(("difference", "rate"), [(78, 0.610), (93, 0.631), (0, 0.5), (400, 10 / 11), (-400, 1 / 11)])
def test_expected_win_rate(difference, rate):
    assert expected_win_rate(difference) == pytest.approx(rate, abs=5e-4)


def test_expected_win_rate_of_arrays_and_extremes():
    assert expected_win_rate([-1e6, 0.0, 1e6]) == pytest.approx([0.0, 0.5, 1.0])


def test_ties_count_half_for_each():
    ratings = bradley_terry([[0, 10.5], [10.5, 0]])
    assert ratings.elo == pytest.approx([1000, 1000])


def test_order_of_models_does_not_matter():
    wins = _play(np.random.default_rng(2), np.array([1100.0, 1000.0, 900.0]), 300)
    order = [2, 0, 1]
    straight, shuffled = bradley_terry(wins), bradley_terry(wins[np.ix_(order, order)])
    assert shuffled.elo == pytest.approx(straight.elo[order])
    assert shuffled.low == pytest.approx(straight.low[order])


def test_by_name_is_sorted_by_strength():
    table = bradley_terry([[0, 5, 1], [9, 0, 4], [9, 6, 0]], names=["base", "mix_rl", "student"]).by_name()
    assert list(table) == ["student", "mix_rl", "base"]
    assert table["student"].low < table["student"].elo < table["student"].high


def test_prior_makes_a_clean_sweep_finite():
    swept = bradley_terry([[0, 20], [0, 0]], names=["a", "b"], prior=0.5)
    # 20.25 against 0.25 wins.
    assert swept.elo[0] - swept.elo[1] == pytest.approx(400 * math.log10(20.25 / 0.25))


@pytest.mark.parametrize(
    ("wins", "options", "message"),
    [
        ([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]], {}, r"\['a', 'b'\] with \['c', 'd'\]"),
        (
            [[0, 3, 2], [0, 0, 1], [0, 1, 0]],
            {"names": "abc"},
            r"\['b', 'c'\] never won .* \['a'\].*prior=0.5",
        ),
        ([[0, 1]], {}, r"shape \(1, 2\)"),
        ([[0, -1], [1, 0]], {}, "0 or more"),
        ([[0, math.nan], [1, 0]], {}, "finite"),
        ([[1, 1], [1, 0]], {}, "diagonal"),
        ([[0, 1], [1, 0]], {"names": ["a"]}, "2 different names"),
        ([[0, 1], [1, 0]], {"names": ["a", "a"]}, "2 different names"),
        ([[0, 1], [1, 0]], {"level": 95}, "received 95"),
        ([[0, 1], [1, 0]], {"prior": -1}, "received -1"),
    ],
)
def test_bad_battles_are_named(wins, options, message):
    names = options.pop("names", "abcd"[: len(wins)])
    with pytest.raises(ValueError, match=message):
        bradley_terry(wins, names=list(names), **options)
