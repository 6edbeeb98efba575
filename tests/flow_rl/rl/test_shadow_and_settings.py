"""Shadow weights against their closed form, reward weights and statistics, windows."""

from __future__ import annotations

import pytest
import torch

from flow_rl.flow.windows import WindowSettings, steps_of_iteration
from flow_rl.rewards.composite import weighted_mean
from flow_rl.rl.reward_metrics import group_statistics, means_by_label
from flow_rl.rl.reward_weights import weights_by_task
from flow_rl.rl.shadow_weights import ShadowWeights


def test_blend_follows_the_closed_form() -> None:
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(layer.weight)
    shadow = ShadowWeights(layer)
    torch.nn.init.ones_(layer.weight)
    for _ in range(5):
        shadow.blend(0.9)
    assert float(shadow.state_dict()["weight"]) == pytest.approx(1 - 0.9**5, rel=1e-6)


def test_applied_restores_both_sides_after_an_error() -> None:
    layer = torch.nn.Linear(2, 2)
    shadow = ShadowWeights(layer)
    with torch.no_grad():
        layer.weight.add_(1)
    live, kept = layer.weight.clone(), shadow.state_dict()["weight"].clone()
    seen = []

    def fail_inside() -> None:
        with shadow.applied():
            seen.append(layer.weight.clone())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert torch.equal(seen[0], kept)
    assert torch.equal(layer.weight, live)
    assert torch.equal(shadow.state_dict()["weight"], kept)


def test_frozen_parameters_are_not_shadowed() -> None:
    layer = torch.nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    assert list(ShadowWeights(layer).state_dict()) == ["weight"]


def test_state_of_other_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.lora"):
        ShadowWeights(torch.nn.Linear(2, 2)).load_state_dict({"other": torch.zeros(1)})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"aesthetics": 0.5, "quality": 0.5}, "Did you mean 'aesthetic'"),
        ({"aesthetic": 1.0}, "no entry for quality"),
        ({"aesthetic": 0.5, "quality": 0.6}, "sums to 1.1"),
        ({"aesthetic": -0.5, "quality": 1.5}, "non-negative"),
    ],
)
def test_weights_are_checked(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weights_by_task(["aesthetic", "quality"], weights)


def test_statistics_leave_masked_scores_out() -> None:
    scores = torch.tensor([1.0, 3.0, float("nan"), 2.0, 2.0, 5.0])
    groups = torch.tensor([7, 7, 7, 9, 9, 9])
    assert group_statistics(scores, groups) == pytest.approx({"range": 2.5, "std": (1 + 2**0.5) / 2})
    found = means_by_label(scores, ["a", "a", "b", "c", "c", "c"])
    assert found == pytest.approx({"a": 2.0, "c": 3.0})


def test_a_masked_reward_leaves_its_weight_to_the_others() -> None:
    nan = float("nan")
    scores = torch.tensor([[4.0, 2.0], [nan, 2.0], [nan, nan]])
    found = weighted_mean(scores, torch.tensor([0.75, 0.25]))
    assert found[:2].tolist() == [3.5, 2.0]
    assert found[2].isnan()


def test_window_is_drawn_anew_each_iteration_from_the_high_noise_part() -> None:
    window = WindowSettings(kind="high_noise", count=2, fraction=0.5)
    drawn = [steps_of_iteration(window, 10, iteration=i, seed=0) for i in range(40)]
    assert drawn == [steps_of_iteration(window, 10, iteration=i, seed=0) for i in range(40)]
    assert {step for steps in drawn for step in steps} == set(range(5))
    assert all(len(set(steps)) == 2 for steps in drawn)
