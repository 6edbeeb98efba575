"""When the monitor's statistics alert, and that they do not when nothing is wrong."""

from __future__ import annotations

import math

import pytest
import torch

from flow_rl.monitoring.alerts import Alert, bands_with_defaults
from flow_rl.monitoring.hacking import Band, allowance, find_drift, find_hacking, p_above, paired_changes, references

PROMPTS, MEMBERS = 24, 2


@pytest.mark.parametrize(
    ("degrees", "t", "tail"),
    # Published upper critical values of Student's t.
    [(1, 6.314, 0.05), (2, 4.303, 0.025), (4, 2.132, 0.05), (10, 2.764, 0.01), (15, 3.733, 0.001), (30, 3.385, 0.001)],
)
def test_p_above_matches_published_tables(degrees: int, t: float, tail: float) -> None:
    values = torch.arange(degrees + 1, dtype=torch.float64) ** 1.5
    error = values.std() / math.sqrt(len(values))
    assert p_above(values, float(values.mean() - t * error)) == pytest.approx(tail, rel=2e-3)
    assert p_above(values, float(values.mean() + t * error)) == pytest.approx(1 - tail, rel=2e-3)
    assert p_above(values, float(values.mean())) == pytest.approx(0.5)


def test_p_values_are_uniform_where_nothing_is_wrong() -> None:
    values = torch.randn(4000, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.7
    found = torch.tensor([p_above(row, 0.7) for row in values])
    for level in (0.01, 0.05, 0.5):
        share, error = (found <= level).double().mean(), math.sqrt(level * (1 - level) / 4000)
        assert abs(share - level) < 4 * error


def test_p_above_of_little() -> None:
    assert p_above(torch.tensor([5.0, math.nan]), 0.0) == 1.0
    assert p_above(torch.tensor([5.0, 5.0]), math.inf) == 1.0
    assert p_above(torch.tensor([2.0, 2.0]), 0.0) == 0.0
    assert p_above(torch.tensor([0.0, 0.0]), 0.0) == 1.0


def test_the_looks_share_the_error_rate() -> None:
    assert sum(allowance(look, 0.05) for look in range(1, 100_000)) == pytest.approx(0.05, rel=1e-4)


def test_references_reach_back_in_powers_of_two_and_to_the_start() -> None:
    assert references(1) == (0,)
    assert references(5) == (0, 1, 3, 4)
    assert references(100) == (0, 36, 68, 84, 92, 96, 98, 99)


def test_changes_are_paired_scorer_by_scorer() -> None:
    nan = math.nan
    before = torch.tensor([[1.0, 2.0], [1.0, 4.0], [nan, 3.0], [2.0, nan]])
    after = torch.tensor([[2.0, 2.0], [3.0, nan], [5.0, 3.5], [nan, 1.0]])
    weights = torch.tensor([[0.75, 0.25]] * 4)
    expected = [(0.75 + 2.0) / 2, 0.5]  # the fourth sample has nothing in common; a mask moves nothing
    torch.testing.assert_close(paired_changes(before, after, weights, 2), torch.tensor(expected, dtype=torch.float64))


def series(*means: float, noise: float = 0.15, seed: int = 0) -> list[torch.Tensor]:
    """Scores (N, 1) of a look each: prompts differ much, and react to training each in its own way."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.rand(PROMPTS, 1, generator=generator).repeat_interleave(MEMBERS, dim=0) * 2 + 1.5
    return [prompts + mean + noise * torch.randn(PROMPTS * MEMBERS, 1, generator=generator) for mean in means]


def alerts(proxy: list[torch.Tensor], panel: list[torch.Tensor], **settings: float) -> list[int]:
    """The looks at which there is an alert."""
    found = []
    for look in range(1, len(proxy)):
        finding = find_hacking(
            proxy[: look + 1],
            panel[: look + 1],
            weights=torch.ones(PROMPTS * MEMBERS, 1),
            members=MEMBERS,
            **settings,
        )
        found += [look] if finding.alert else []
    return found


def test_silent_while_reward_and_monitors_rise_together() -> None:
    rising = [0.05 * i for i in range(12)]
    assert alerts(series(*rising), series(*[0.6 * r for r in rising], seed=1)) == []


def test_silent_while_nothing_happens_but_noise() -> None:
    flat = [0.0] * 16
    false = [alerts(series(*flat, seed=2 * i), series(*flat, seed=2 * i + 1), margin=0.0) for i in range(40)]
    assert sum(map(bool, false)) <= 2


def test_silent_while_both_fall_or_reward_is_flat() -> None:
    falling = [-0.08 * i for i in range(8)]
    assert alerts(series(*falling), series(*falling, seed=1)) == []
    assert alerts(series(*[0.0] * 8, noise=0.3), series(*falling, seed=1)) == []


def test_alert_once_the_reward_rises_and_the_monitors_fall() -> None:
    rising, falling = [0.15 * i for i in range(6)], [-0.08 * i for i in range(6)]
    found = alerts(series(*rising), series(*falling, seed=1))
    assert found
    assert found[-1] == 5
    assert found[0] <= 4
    assert alerts(series(*rising), series(*falling, seed=1), margin=0.5) == []


def test_a_late_hack_is_seen_although_the_monitors_are_above_where_they_began() -> None:
    rising = [0.1 * i for i in range(16)]
    panel = [0.1 * i for i in range(9)] + [0.8 - 0.08 * i for i in range(1, 8)]
    proxy, monitors = series(*rising), series(*panel, seed=1)
    assert panel[-1] > panel[0]
    found = alerts(proxy, monitors)
    assert found
    assert min(found) > 8
    finding = find_hacking(proxy, monitors, weights=torch.ones(PROMPTS * MEMBERS, 1), members=MEMBERS)
    assert finding.since in references(15)[1:]
    assert finding.changes["proxy"] > 0 > finding.changes["panel"]


def test_a_monitor_that_fails_is_neither_rise_nor_fall() -> None:
    proxy = series(0.0, 1.0)
    high, low = series(0.0, 0.0, seed=1), series(-2.0, -2.0, seed=2)
    before = torch.cat([high[0], low[0]], dim=1)
    after = torch.cat([torch.full_like(high[1], math.nan), low[1]], dim=1)  # the mean of what is left is far lower
    assert alerts(proxy, [before, after]) == []
    silent = torch.full((PROMPTS * MEMBERS, 1), math.nan)
    assert alerts(proxy, [silent, silent]) == []


def test_weights_decide_what_the_proxy_is() -> None:
    up, down, panel = series(0.0, 1.0), series(0.0, -1.0, seed=1), series(0.0, -1.0, seed=2)
    proxy = [torch.cat([a, b], dim=1) for a, b in zip(up, down, strict=True)]
    for share, alert in ((0.9, True), (0.1, False)):
        weights = torch.tensor([[share, 1 - share]]).expand(PROMPTS * MEMBERS, -1)
        assert find_hacking(proxy, panel, weights=weights, members=MEMBERS).alert is alert


def test_drift_alerts_beyond_the_band_only() -> None:
    generator = torch.Generator().manual_seed(0)
    before = {"brightness": 0.4 + 0.1 * torch.rand(PROMPTS, generator=generator)}
    jitter = 0.02 * torch.randn(PROMPTS, generator=generator)
    for factor, alert in ((1.0, False), (1.25, False), (1.31, False), (1.5, True), (0.75, False), (0.5, True)):
        after = {"brightness": factor * before["brightness"] + jitter}
        (finding,) = find_drift(before, after, {"brightness": Band(low=-0.3, high=0.3)}, look=3)
        assert finding.alert is alert, factor
        assert finding.changes["brightness"] == pytest.approx(factor - 1, abs=0.03)
    (finding,) = find_drift(before, {"brightness": 9 * before["brightness"]}, {"brightness": Band(low=-0.5)}, look=1)
    assert not finding.alert


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="contain 0"):
        Band(low=0.1, high=0.3)
    with pytest.raises(ValueError, match="Did you mean 'brightness'"):
        bands_with_defaults({"brigthness": Band()}, 2)
    with pytest.raises(ValueError, match="two looks"):
        find_hacking(series(0.0), series(0.0), weights=torch.ones(48, 1), members=2)
    assert "diversity" in bands_with_defaults(None, 2)
    assert "diversity" not in bands_with_defaults(None, 1)


def test_an_alert_says_what_moved() -> None:
    finding = find_hacking(
        series(0.0, 1.0), series(0.0, -1.0, seed=1), weights=torch.ones(PROMPTS * MEMBERS, 1), members=MEMBERS
    )
    message = Alert.of(finding, iteration=20, since=0, action="warn", band=None).message
    assert "Iteration 20" in message
    assert "reward rose by 1.0" in message
    assert "fell by 1.0" in message
