"""Losses against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flow_rl.rewards.conversation import IGNORED
from flow_rl.rewards.losses import pairwise_loss, pointwise_loss, turn_cross_entropy

DIGITS = (2, 3, 4, 5, 6)


def logits_with(probabilities: dict[int, float], size: int = 8) -> Tensor:
    """Logits of one prediction whose softmax is the given one."""
    rest = (1 - sum(probabilities.values())) / (size - len(probabilities))
    return torch.tensor([math.log(probabilities.get(i, rest)) for i in range(size)])


def test_turn_cross_entropy_is_the_mean_over_each_turns_own_labels() -> None:
    logits = torch.stack([torch.stack([logits_with({1: 0.5}), logits_with({2: 0.25})]), torch.zeros(2, 8)])
    labels = torch.tensor([[1, 2], [IGNORED, IGNORED]])
    found = turn_cross_entropy(logits, labels)
    torch.testing.assert_close(found, torch.tensor([(math.log(2) + math.log(4)) / 2, 0.0]))


def test_pointwise_loss_equals_its_closed_form() -> None:
    # at the digit: p(3) = 0.1, p(4) = 0.6, p(5) = 0.1, the other digits next to nothing, 0.2 elsewhere
    digit = logits_with({4: 0.1, 5: 0.6, 6: 0.1, 2: 1e-12, 3: 1e-12})
    word = logits_with({0: 0.5})
    logits = torch.stack([torch.stack([word, digit]), torch.stack([digit, word])])
    labels = torch.tensor([[0, 5], [5, 0]])
    score = (3 * 0.1 + 4 * 0.6 + 5 * 0.1) / 0.8
    loss, metrics = pointwise_loss(
        logits, labels, torch.tensor([1, 0]), torch.tensor([4.0, 3.5]), DIGITS, cross_entropy=0.5, regression=2.0
    )
    between = (math.log(0.1) + math.log(0.6)) / 2  # 3.5 is learnt as half a 3 and half a 4
    entropy = -((math.log(0.5) + math.log(0.6)) / 2 + (math.log(0.5) + between) / 2) / 2
    squared = ((score - 4) ** 2 + (score - 3.5) ** 2) / 2
    assert loss.item() == pytest.approx(0.5 * entropy + 2 * squared, abs=1e-5)
    assert metrics["cross_entropy"].item() == pytest.approx(entropy, abs=1e-5)
    assert metrics["squared_error"].item() == pytest.approx(squared, abs=1e-5)
    assert metrics["outside_mass"].item() == pytest.approx(0.2, abs=1e-5)


@pytest.mark.parametrize("target", [1.0, 2.3, 3.5, 4.75, 5.0])
def test_the_cross_entropy_alone_leads_to_the_score(target: float) -> None:
    """Without the squared error: the digits' probabilities that minimise the loss have the score as expectation."""
    logits = torch.zeros(1, 1, 8, dtype=torch.float64, requires_grad=True)
    nearest = DIGITS[min(5, math.floor(target + 0.5)) - 1]
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss, _ = pointwise_loss(
            logits,
            torch.tensor([[nearest]]),
            torch.tensor([0]),
            torch.tensor([target]),
            DIGITS,
            cross_entropy=1.0,
            regression=0.0,
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    inside = logits.detach()[0, 0, list(DIGITS)].softmax(-1)
    assert float((inside * torch.arange(1, 6)).sum()) == pytest.approx(target, abs=1e-2)


def test_pairwise_loss_equals_its_closed_form() -> None:
    better = logits_with({6: 0.8, 2: 1e-12, 3: 1e-12, 4: 1e-12, 5: 1e-12})  # R = 5, mass 0.8
    worse = logits_with({3: 0.5, 2: 1e-12, 4: 1e-12, 5: 1e-12, 6: 1e-12})  # R = 2, mass 0.5
    logits = torch.stack([better[None], worse[None]])
    labels = torch.full((2, 1), IGNORED)
    loss, metrics = pairwise_loss(logits, labels, torch.zeros(2, dtype=torch.long), DIGITS, cross_entropy=0.1)
    preference = math.log(1 + math.exp(-3))
    entropy = -(math.log(0.8) + math.log(0.5)) / 2
    assert loss.item() == pytest.approx(preference + 0.1 * entropy, abs=1e-5)
    assert metrics["bradley_terry"].item() == pytest.approx(preference, abs=1e-5)
    assert metrics["accuracy"].item() == 1
    swapped, metrics = pairwise_loss(
        logits.flip(0), labels, torch.zeros(2, dtype=torch.long), DIGITS, cross_entropy=0.0
    )
    assert swapped.item() == pytest.approx(math.log(1 + math.exp(3)), abs=1e-5)
    assert metrics["accuracy"].item() == 0


def test_losses_do_not_depend_on_how_the_batch_is_split() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 8, generator=generator)
    labels = torch.tensor([[0, 1, 4], [IGNORED, 2, 3], [IGNORED, IGNORED, 6], [1, 1, 2]])  # the digits 3, 2, 5, 1
    index, targets = torch.tensor([2, 2, 2, 2]), torch.tensor([3.0, 2.0, 5.0, 1.0])

    def loss(rows: slice) -> Tensor:
        weights = {"cross_entropy": 1.0, "regression": 1.0}
        return pointwise_loss(logits[rows], labels[rows], index[rows], targets[rows], DIGITS, **weights)[0]

    torch.testing.assert_close(loss(slice(0, 4)), (loss(slice(0, 2)) + loss(slice(2, 4))) / 2)
