"""The range filter's arithmetic, on scores whose ranges were written down first."""

from __future__ import annotations

import math

import pytest
import torch

from flow_rl.curation.selection import composite_ranges, group_ranges, select_prompts, threshold_to_keep

NAN = float("nan")


def planted(ranges: list[float], members: int = 4, base: float = 2.0) -> torch.Tensor:
    """Scores (P, G, 1) with the given ranges: one image at the bottom, one at the top, the others between."""
    shares = torch.tensor([0.0, 1.0, 0.3, 0.7])[:members]
    return (base + torch.tensor(ranges).unsqueeze(1) * shares).unsqueeze(2)


def test_known_ranges_in_right_prompts_out() -> None:
    ranges = [0.0, 0.2, 0.49, 0.51, 1.7, 2.5]
    found = composite_ranges(planted(ranges), torch.ones(6, 1))
    assert found.tolist() == pytest.approx(ranges, abs=1e-6)
    selection = select_prompts([10, 11, 12, 13, 14, 15], ["a", "b"] * 3, found, 0.5)
    assert selection.kept == (13, 14, 15)
    assert {name: (c.prompts, c.kept) for name, c in selection.categories.items()} == {"a": (3, 1), "b": (3, 2)}


def test_a_range_must_exceed_the_threshold() -> None:
    ranges = torch.tensor([0.5, 0.75], dtype=torch.float64)
    assert select_prompts([1, 2], ["a", "a"], ranges, 0.5).kept == (2,)


def test_composite_weighs_raw_scores() -> None:
    scores = torch.tensor([[[1.0, 5.0], [3.0, 4.0], [5.0, 1.0]]])
    # 0.75/0.25: 2.0, 3.25, 4.0; by half: 3.0, 3.5, 3.0
    assert composite_ranges(scores, torch.tensor([[0.75, 0.25]])).item() == pytest.approx(2.0)
    assert composite_ranges(scores, torch.tensor([[0.5, 0.5]])).item() == pytest.approx(0.5)


def test_masked_rewards_are_left_out_and_the_rest_scaled_up() -> None:
    scores = torch.tensor(
        [
            [[2.0, NAN], [3.0, 5.0], [NAN, NAN]],  # 2 and 0.5 * 3 + 0.5 * 5
            [[2.0, 3.0], [NAN, NAN], [NAN, NAN]],  # one image
            [[NAN, NAN], [NAN, NAN], [NAN, NAN]],  # none
        ]
    )
    found = composite_ranges(scores, torch.full((3, 2), 0.5))
    assert found[0].item() == pytest.approx(2.0)
    assert found[1:].isnan().all()
    selection = select_prompts([1, 2, 3], ["a"] * 3, found, 1.0)
    assert selection.kept == (1,)
    assert selection.categories["a"].unscored == 2


def test_a_reward_of_no_weight_neither_scores_nor_widens() -> None:
    scores = torch.tensor([[[2.0, 1.0], [2.0, 5.0], [NAN, 3.0]]])
    assert composite_ranges(scores, torch.tensor([[1.0, 0.0]])).item() == 0.0


def test_order_makes_no_difference() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = 1 + 4 * torch.rand(40, 5, 3, generator=generator)
    scores[torch.rand(scores.shape, generator=generator) < 0.2] = NAN
    weights = torch.rand(40, 3, generator=generator)
    weights = weights / weights.sum(1, keepdim=True)
    ids, categories = list(range(100, 140)), [f"c{i % 4}" for i in range(40)]
    expected = select_prompts(ids, categories, composite_ranges(scores, weights), 1.0)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        order, members, rewards = (torch.randperm(n, generator=generator) for n in (40, 5, 3))
        mixed = scores[order][:, members][:, :, rewards]
        found = select_prompts(
            [ids[i] for i in order],
            [categories[i] for i in order],
            composite_ranges(mixed, weights[order][:, rewards]),
            1.0,
        )
        assert found.kept == expected.kept
        assert {n: (c.kept, c.unscored) for n, c in found.categories.items()} == {
            n: (c.kept, c.unscored) for n, c in expected.categories.items()
        }


def test_groups_in_any_order() -> None:
    composite = torch.tensor([1.0, 4.0, 2.0, NAN, 2.5, 5.0])
    groups = torch.tensor([7, 3, 7, 3, 9, 3])
    distinct, ranges = group_ranges(composite, groups)
    assert distinct.tolist() == [3, 7, 9]
    assert ranges[:2].tolist() == [1.0, 1.0]
    assert ranges[2].isnan()


def test_losing_a_category_is_an_error_that_says_what_would_help() -> None:
    ranges = torch.tensor([1.0, 2.0, 0.30, 0.20, 0.10, 0.40])
    with pytest.raises(ValueError) as caught:
        select_prompts(range(6), ["a", "a", *["typography"] * 4], ranges, 0.8)
    message = str(caught.value)
    assert "'typography'" in message
    assert "'a'" not in message
    assert "its widest range is 0.400" in message
    for threshold, kept in ((0.399, 1), (0.299, 2)):
        if f"{threshold:g} would keep {kept} of 4" in message:
            assert sum(r > threshold for r in ranges[2:].tolist()) == kept
    assert "would keep 1 of 4" in message
    assert "would keep 2 of 4" in message


@pytest.mark.parametrize(
    ("ranges", "words"),
    [([0.0, 0.0], "have a range of 0"), ([NAN, NAN], "two images with a score")],
    ids=["constant", "unscored"],
)
def test_a_category_beyond_help_says_why(ranges, words) -> None:
    with pytest.raises(ValueError, match=words):
        select_prompts([1, 2], ["flat"] * 2, torch.tensor(ranges), 0.1)


def test_suggested_threshold_is_the_largest_that_keeps_so_many() -> None:
    generator = torch.Generator().manual_seed(3)
    ranges = [*(4 * torch.rand(50, generator=generator)).tolist(), 0.5, 0.25]  # binary fractions meet the rounding
    for count in (1, 7, 26, 52):
        threshold = threshold_to_keep(ranges, count)
        assert sum(r > threshold for r in ranges) >= count
        assert sum(r > threshold + 0.001 for r in ranges) < count
    assert threshold_to_keep(ranges, 53) is None
    assert threshold_to_keep([0.0, 1.0], 2) is None


@pytest.mark.parametrize("threshold", [-0.1, 4.0, math.nan])
def test_impossible_threshold(threshold) -> None:
    with pytest.raises(ValueError, match="threshold is"):
        select_prompts([1], ["a"], torch.tensor([1.0]), threshold)
