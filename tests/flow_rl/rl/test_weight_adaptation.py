"""Moving weights: the projection against a general solver, the moves against hand calculation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from flow_rl.rl.weight_adaptation import AdaptationSettings, adapted, project, smoothed_means


def test_projection_is_the_nearest_point() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        centre = torch.rand(4, generator=generator).double()
        centre /= centre.sum()
        point = centre + 0.4 * torch.randn(4, generator=generator).double()
        found = project(point.unsqueeze(0), centre.unsqueeze(0), 0.1)[0].numpy()
        bounds = [(max(0.0, c - 0.1), min(1.0, c + 0.1)) for c in centre.tolist()]
        best = minimize(
            lambda w, p: ((w - p) ** 2).sum(),
            centre.numpy(),
            args=(point.numpy(),),
            bounds=bounds,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            options={"ftol": 1e-14},
        ).x
        assert np.abs(found - best).max() < 1e-5
        assert found.sum() == pytest.approx(1, abs=1e-12)


def test_a_point_inside_stays() -> None:
    centre = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    point = torch.tensor([[0.45, 0.33, 0.22]], dtype=torch.float64)
    torch.testing.assert_close(project(point, centre, 0.1), point, atol=1e-12, rtol=0)


def test_one_move_by_hand() -> None:
    table = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    means = torch.tensor([[4.5, 3.5]], dtype=torch.float64)  # headroom 0.5 and 1.5: target 1/4 and 3/4
    settings = AdaptationSettings(rate=0.1, radius=0.2)
    once = adapted(table, table, means, settings)
    assert once.tolist()[0] == pytest.approx([0.475, 0.525])
    for _ in range(200):
        once = adapted(once, table, means, settings)
    assert once.tolist()[0] == pytest.approx([0.3, 0.7])  # held by the trust region, on the way to 1/4 and 3/4


def test_rewards_switched_off_stay_off_and_unseen_rows_stay() -> None:
    table = torch.tensor([[0.6, 0.4, 0.0], [0.5, 0.3, 0.2]], dtype=torch.float64)
    nan = torch.nan
    means = torch.tensor([[4.0, 2.0, nan], [3.0, nan, 3.0]], dtype=torch.float64)
    moved = adapted(table, table, means, AdaptationSettings(rate=0.5))
    assert moved[0, 2] == 0
    assert moved[0, 1] > 0.4
    assert torch.equal(moved[1], table[1])
    full = torch.full_like(means, 5.0)
    assert torch.equal(adapted(table, table, full, AdaptationSettings()), table)  # nowhere to go


def test_running_means() -> None:
    nan = torch.nan
    means = torch.tensor([[nan, 2.0, 3.0]])
    found = smoothed_means(means, torch.tensor([[8.0, 6.0, 0.0]]), torch.tensor([[2.0, 2.0, 0.0]]), 0.75)
    assert found.tolist() == [[4.0, 2.25, 3.0]]


@pytest.mark.parametrize("changes", [{"rate": 0.0}, {"radius": 2.0}, {"smoothing": 1.0}])
def test_impossible_settings(changes) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        AdaptationSettings(**changes)
