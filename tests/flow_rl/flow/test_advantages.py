"""Group advantages against a plain float64 loop over groups, and their invariants."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flow_rl.flow.advantages import group_advantages, rows_with_signal


def example(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    groups = torch.tensor([7, 2, 7, 2, 7, 2**40 + 1, 2, 2**40 + 1, 7, 2**40, 2**40, 2**40])
    scores = 1 + 4 * torch.rand(12, 3, generator=generator)
    weights = torch.tensor([0.5, 0.3, 0.2]).expand(12, 3)
    return scores, groups, weights


def by_loops(scores: Tensor, groups: Tensor, weights: Tensor, floor: float) -> Tensor:
    """Eq. 13, one number at a time."""
    n, k = scores.shape
    out = []
    for i in range(n):
        total = weight_left = 0.0
        for j in range(k):
            if scores[i, j].isnan():
                continue
            mates = [float(scores[m, j]) for m in range(n) if groups[m] == groups[i] and not scores[m, j].isnan()]
            mu = sum(mates) / len(mates)
            sigma = (sum((r - mu) ** 2 for r in mates) / len(mates)) ** 0.5
            total += float(weights[i, j]) * (float(scores[i, j]) - mu) / max(sigma, floor)
            weight_left += float(weights[i, j])
        out.append(total / weight_left if weight_left else 0.0)
    return torch.tensor(out)


def test_matches_a_plain_loop() -> None:
    scores, groups, weights = example()
    expected = by_loops(scores, groups, weights, 0.05)
    torch.testing.assert_close(group_advantages(scores, groups, weights, std_floor=0.05), expected)


def test_matches_a_plain_loop_with_masks_and_weights_a_sample() -> None:
    scores, groups, _ = example()
    weights = torch.rand(12, 3, generator=torch.Generator().manual_seed(1))
    weights = weights / weights.sum(1, keepdim=True)
    for row, column in ((0, 0), (1, 1), (3, 1), (6, 1), (5, 0), (5, 1), (5, 2), (11, 2)):
        scores[row, column] = torch.nan
    advantages = group_advantages(scores, groups, weights, std_floor=0.5)
    torch.testing.assert_close(advantages, by_loops(scores, groups, weights, 0.5))
    assert advantages[5] == 0
    assert torch.isfinite(advantages).all()


def test_each_group_sums_to_zero() -> None:
    scores, groups, weights = example()
    advantages = group_advantages(scores, groups, weights)
    for group in groups.unique():
        assert abs(float(advantages[groups == group].sum())) < 1e-6


def test_one_reward_is_the_plain_z_score() -> None:
    scores, groups, _ = example()
    advantages = group_advantages(scores[:, :1], groups, torch.ones(12, 1))
    for group in groups.unique():
        r = scores[groups == group, 0]
        torch.testing.assert_close(advantages[groups == group], (r - r.mean()) / r.std(unbiased=False))


@pytest.mark.parametrize("std_floor", [0.0, 0.05])
@pytest.mark.parametrize("mode", ["per_reward", "sum"])
def test_constant_reward_contributes_exactly_zero(std_floor: float, mode: str) -> None:
    # 0.1 is not a float, and the mean of an odd number of them need not be the same float.
    groups = torch.zeros(7, dtype=torch.int64)
    constant = torch.full((7, 2), 0.1, dtype=torch.float64)
    advantages = group_advantages(constant, groups, torch.full((7, 2), 0.5), std_floor=std_floor, mode=mode)
    assert torch.equal(advantages, torch.zeros(7))
    varied = torch.linspace(1, 5, 7, dtype=torch.float64)
    both = torch.stack([varied, constant[:, 0]], dim=1)
    alone = group_advantages(varied[:, None], groups, torch.ones(7, 1))
    torch.testing.assert_close(group_advantages(both, groups, torch.full((7, 2), 0.5)), alone / 2)


def test_floor_is_the_smallest_divisor() -> None:
    scores = torch.tensor([[3.00], [3.02]])
    groups = torch.tensor([4, 4])
    advantages = group_advantages(scores, groups, torch.ones(2, 1), std_floor=0.1)
    torch.testing.assert_close(advantages, torch.tensor([-0.1, 0.1]), rtol=1e-4, atol=0.0)


def test_neighbouring_large_ids_stay_apart() -> None:
    # 2^40 and 2^40 + 1 are one float32.
    scores = torch.tensor([[1.0], [2.0], [4.0], [5.0]])
    groups = torch.tensor([2**40, 2**40, 2**40 + 1, 2**40 + 1])
    advantages = group_advantages(scores, groups, torch.ones(4, 1))
    torch.testing.assert_close(advantages, torch.tensor([-1.0, 1.0, -1.0, 1.0]))


def test_order_does_not_matter() -> None:
    scores, groups, weights = example()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    shuffled = group_advantages(scores[order], groups[order], weights[order])
    torch.testing.assert_close(shuffled, group_advantages(scores, groups, weights)[order])


def test_sum_mode_lets_the_widest_reward_rule() -> None:
    # The reason for normalising each reward: here the second, ten times wider, decides the sum alone.
    scores = torch.tensor([[1.4, 1.0], [1.0, 5.0], [1.2, 3.0]])
    groups, weights = torch.zeros(3, dtype=torch.int64), torch.full((3, 2), 0.5)
    summed = group_advantages(scores, groups, weights, mode="sum")
    composite = (scores * 0.5).sum(1)
    expected = (composite - composite.mean()) / composite.std(unbiased=False)
    torch.testing.assert_close(summed, expected)
    each = group_advantages(scores, groups, weights)
    torch.testing.assert_close(each, torch.zeros(3), atol=1e-6, rtol=0.0)


def test_batch_normalisation_and_clip() -> None:
    scores, groups, weights = example()
    scores[0] = torch.nan
    plain = group_advantages(scores, groups, weights)
    normalised = group_advantages(scores, groups, weights, batch_normalise=True)
    rest = plain[1:]
    torch.testing.assert_close(normalised[1:], (rest - rest.mean()) / rest.std(unbiased=False))
    assert normalised[0] == 0
    clipped = group_advantages(scores, groups, weights, clip=0.5)
    assert torch.equal(clipped, plain.clamp(-0.5, 0.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": torch.zeros(4)}, "float32.*collide"),
        ({"groups": torch.zeros(3, dtype=torch.int64)}, r"groups \(N,\)"),
        ({"weights": torch.tensor([0.5, 0.5])}, r"weights.expand\(N, K\)"),
        ({"weights": torch.full((4, 2), 0.6)}, "sums to 1.2"),
        ({"weights": torch.tensor([[1.5, -0.5]]).expand(4, 2)}, "must not be negative"),
        ({"weights": torch.full((4, 2), torch.nan)}, "must sum to 1"),
        ({"scores": torch.full((4, 2), torch.inf)}, r"scores\[0, 0\] is infinite"),
        ({"std_floor": -1.0}, "std_floor"),
        ({"clip": 0.0}, "clip"),
        ({"mode": "each"}, "'per_reward' or 'sum'"),
    ],
)
def test_bad_input_is_explained(change: dict, message: str) -> None:
    good = {
        "scores": torch.ones(4, 2),
        "groups": torch.zeros(4, dtype=torch.int64),
        "weights": torch.full((4, 2), 0.5),
    }
    with pytest.raises(ValueError, match=message):
        group_advantages(**(good | change))


NAN = float("nan")
SIGNALS = {
    "flat": ([[3.0, 1.0], [3.0, 1.0], [3.0, 1.0]], [False] * 3),
    "one reward differs": ([[3.0, 1.0], [3.0, 2.0], [3.0, 3.0]], [True] * 3),  # the middle one has advantage 0
    "unscored": ([[NAN, NAN], [3.0, 2.0], [3.0, 3.0]], [False, True, True]),
    "nobody scored": ([[NAN, NAN]] * 3, [False] * 3),
    "one scored": ([[NAN, NAN], [NAN, NAN], [2.0, 2.0]], [False] * 3),
    "masked in part": ([[3.0, NAN], [3.0, 2.0], [3.0, 4.0]], [True] * 3),
    "rounding": ([[3.0, 1.0], [3.0 + 4e-7, 1.0], [3.0, 1.0]], [False] * 3),
}


@pytest.mark.parametrize("mode", ["per_reward", "sum"])
@pytest.mark.parametrize("name", SIGNALS)
def test_groups_with_a_signal(name: str, mode: str) -> None:
    rows, expected = SIGNALS[name]
    # A second group, interleaved, whose signal is another: no group answers for another.
    scores = torch.tensor([*rows, [1.0, 1.0], [5.0, 1.0]])[[0, 3, 1, 4, 2]]
    groups = torch.tensor([7, 2**40, 7, 2**40, 7])
    weights = torch.tensor([0.75, 0.25]).expand(5, 2)
    found = rows_with_signal(scores, groups, weights, mode=mode)
    assert found[[0, 2, 4]].tolist() == expected
    assert found[[1, 3]].all()
    advantages = group_advantages(scores, groups, weights, mode=mode)
    assert advantages[~found].abs().max() < 1e-4 if (~found).any() else True
    assert advantages[found].any()


def test_a_reward_without_weight_is_no_signal() -> None:
    scores, groups = torch.tensor([[3.0, 1.0], [3.0, 5.0]]), torch.tensor([1, 1])
    assert not rows_with_signal(scores, groups, torch.tensor([1.0, 0.0]).expand(2, 2)).any()
    assert rows_with_signal(scores, groups, torch.tensor([0.5, 0.5]).expand(2, 2)).all()


def test_rewards_that_cancel_in_the_sum_are_a_signal_one_by_one() -> None:
    scores, groups = torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.tensor([1, 1])
    weights = torch.tensor([0.5, 0.5]).expand(2, 2)
    assert rows_with_signal(scores, groups, weights, mode="per_reward").all()
    assert not rows_with_signal(scores, groups, weights, mode="sum").any()
