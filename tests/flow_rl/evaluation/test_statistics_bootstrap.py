import math

import numpy as np
import pytest

from flow_rl.evaluation.statistics import Interval, bootstrap_mean, gain_share, mean_of_gains, paired_gain


def _coverage(prompts: int, samples: int, repeats: int) -> float:
    """Share of intervals that hold the true mean 0.4; prompts differ as much as samples of a prompt."""
    rng = np.random.default_rng(prompts)
    hits = 0
    for seed in range(repeats):
        difficulty = rng.normal(0.4, 1.0, size=(prompts, 1))
        interval = bootstrap_mean(difficulty + rng.normal(size=(prompts, samples)), resamples=600, seed=seed)
        hits += interval.low <= 0.4 <= interval.high
    return hits / repeats


@pytest.mark.parametrize("prompts", [8, 60])
def test_intervals_cover_the_truth_as_often_as_they_say(prompts):
    # 1200 repeats: the standard error of the coverage is 0.6 %, so 93-97 % leaves three of them.
    assert 0.93 <= _coverage(prompts, samples=3, repeats=1200) <= 0.97


def test_matches_the_normal_interval():
    values = np.random.default_rng(0).uniform(size=2000)
    interval = bootstrap_mean(values, resamples=20_000)
    reach = 1.959964 * values.std(ddof=1) / math.sqrt(values.size)
    assert interval.mean == pytest.approx(values.mean(), abs=1e-12)
    assert interval.low == pytest.approx(values.mean() - reach, abs=0.03 * reach)
    assert interval.high == pytest.approx(values.mean() + reach, abs=0.03 * reach)


def test_few_prompts_get_students_width():
    values = np.random.default_rng(3).normal(size=10)
    interval = bootstrap_mean(values, resamples=50_000)
    students = 2 * 2.262157 * values.std(ddof=1) / math.sqrt(10)  # tabulated t(0.975, 9)
    assert interval.high - interval.low == pytest.approx(students, rel=0.06)


def test_level_sets_the_width():
    values = np.random.default_rng(1).normal(size=1000)
    ratio = [bootstrap_mean(values, level=level, resamples=20_000) for level in (0.68269, 0.95)]
    narrow, wide = (interval.high - interval.low for interval in ratio)
    assert wide / narrow == pytest.approx(1.96, rel=0.05)


def test_samples_of_a_prompt_are_not_independent():
    prompt_means = np.random.default_rng(2).normal(size=40)
    repeated = np.repeat(prompt_means[:, None], 25, axis=1)
    assert bootstrap_mean(repeated).low == pytest.approx(bootstrap_mean(prompt_means).low, abs=1e-9)
    assert bootstrap_mean(repeated).n == 40


def test_pairing_narrows_correlated_scores():
    rng = np.random.default_rng(4)
    before = rng.normal(size=200)
    after = before + 0.2 + 0.3 * rng.normal(size=200)
    gain = paired_gain(before, after)
    first, second = bootstrap_mean(before), bootstrap_mean(after)
    unpaired = math.hypot(first.high - first.low, second.high - second.low)
    # Differences have standard deviation 0.3; unpaired means add variances 1 and 1.09.
    assert (gain.high - gain.low) / unpaired == pytest.approx(0.3 / math.sqrt(2.09), rel=0.15)
    assert gain.mean == pytest.approx((after - before).mean())
    assert gain.low > 0


def test_paired_gain_allows_different_numbers_of_samples():
    before, after = np.array([[1.0, 3.0], [2.0, 2.0], [4.0, 0.0]]), np.array([2.5, 3.0, 2.0])
    assert paired_gain(before, after).mean == pytest.approx((0.5 + 1.0 + 0.0) / 3)


def test_rows_with_nan_are_dropped_and_counted():
    values = np.array([[1.0, 2.0], [np.nan, 100.0], [3.0, 4.0], [5.0, 6.0]])
    interval = bootstrap_mean(values)
    assert (interval.n, interval.mean) == (3, 3.5)
    gain = paired_gain([1.0, 1.0, np.nan, 1.0], [2.0, np.nan, 5.0, 3.0])
    assert (gain.n, gain.mean) == (2, 1.5)


def test_same_seed_same_interval():
    values = np.random.default_rng(5).normal(size=50)
    assert bootstrap_mean(values, seed=7) == bootstrap_mean(values, seed=7)
    assert bootstrap_mean(values, seed=7).low != bootstrap_mean(values, seed=8).low


def test_blocks_do_not_change_the_resamples(monkeypatch):
    values = np.random.default_rng(6).normal(size=30)
    whole = bootstrap_mean(values)
    monkeypatch.setattr("flow_rl.evaluation.statistics._BLOCK_ENTRIES", 100)
    assert bootstrap_mean(values) == whole


def test_equal_values_give_a_point():
    interval = bootstrap_mean(np.full(7, 0.1))
    assert interval.low == pytest.approx(0.1)
    assert interval.high == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_mean([]), "empty"),
        (lambda: bootstrap_mean(np.empty((3, 0))), "empty"),
        (lambda: bootstrap_mean([np.nan, np.nan, 1.0]), "received 1 of 3"),
        (lambda: bootstrap_mean([1.0, np.inf]), "1 infinite"),
        (lambda: bootstrap_mean(np.ones((2, 2, 2))), r"received \(2, 2, 2\)"),
        (lambda: bootstrap_mean([1.0, 2.0], level=95), "received 95"),
        (lambda: bootstrap_mean([1.0, 2.0], resamples=10), "received 10"),
        (lambda: paired_gain([1.0, 2.0], [1.0, 2.0, 3.0]), "2 rows before and 3 after"),
        (lambda: Interval(mean=1.0, low=2.0, high=3.0, n=4), "low <= mean <= high"),
        (lambda: Interval(mean=math.nan, low=0.0, high=1.0, n=4), "finite"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_share_of_a_gain_is_a_ratio_of_means_and_covers_the_truth():
    rng = np.random.default_rng(5)
    inside = 0
    for repeat in range(100):
        base = rng.normal(size=120)
        teacher = base + 1.0 + rng.normal(size=120)
        student = base + 0.8 + rng.normal(size=120)
        share = gain_share(base, teacher, student, resamples=400, seed=repeat)
        assert share.mean == pytest.approx((student - base).mean() / (teacher - base).mean())
        inside += share.low <= 0.8 <= share.high
    assert inside >= 88  # 95 of 100, with three standard errors


def test_share_of_no_gain_is_none():
    rng = np.random.default_rng(6)
    base = rng.normal(size=50)
    assert gain_share(base, base + rng.normal(size=50) * 0.1, base + 1) is None


def test_mean_of_gains_weighs_tasks_alike_and_adds_their_variances():
    rng = np.random.default_rng(7)
    one, other = rng.normal(1.0, 2.0, 400), rng.normal(3.0, 1.0, 100)
    found = mean_of_gains([one, np.append(other, np.nan)])
    assert found.mean == pytest.approx((one.mean() + other.mean()) / 2)
    assert found.n == 500
    error = 0.5 * np.sqrt(one.var() / 400 + other.var() / 100)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    with pytest.raises(ValueError, match="at least 2 prompts"):
        mean_of_gains([one, [1.0]])
