"""The readout against hand-computed expectations."""

from __future__ import annotations

import math

import pytest
import torch

from flow_rl.rewards.readout import apply_cap, digit_token_ids, ends_before_digit, expected_score

DIGITS = (10, 3, 7, 5, 1)


class Letters:
    """A tokenizer whose vocabulary is given."""

    def __init__(self, known: dict[str, list[int]]) -> None:
        self.known = known

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return self.known[text]


def test_expected_score_equals_a_hand_computed_expectation() -> None:
    logits = torch.full((12,), math.log(0.01))
    for token, probability in zip(DIGITS, (0.0, 0.1, 0.2, 0.1, 0.4), strict=True):
        logits[token] = math.log(probability) if probability else -torch.inf
    logits[0] = math.log(0.14)  # with six others at 0.01 the whole is 1, and 0.2 of it are no digits
    score, outside = expected_score(logits, DIGITS)
    # 1 * 0 + 2 * 0.1 + 3 * 0.2 + 4 * 0.1 + 5 * 0.4 = 3.2, over a mass of 0.8
    assert score.item() == pytest.approx(4.0, abs=1e-6)
    assert outside.item() == pytest.approx(0.2, abs=1e-6)


def test_expected_score_agrees_with_float64_for_any_leading_shape_and_low_precision() -> None:
    logits = (torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0)) * 4).bfloat16()
    score, outside = expected_score(logits, DIGITS)
    whole = logits.double().softmax(-1)
    inside = whole[..., list(DIGITS)]
    reference = (inside * torch.tensor([1.0, 2, 3, 4, 5])).sum(-1) / inside.sum(-1)
    assert score.shape == outside.shape == (2, 3)
    assert score.dtype == outside.dtype == torch.float32
    torch.testing.assert_close(score.double(), reference, atol=1e-6, rtol=0)
    torch.testing.assert_close(outside.double(), 1 - inside.sum(-1), atol=1e-6, rtol=0)


def test_tiny_outside_mass_is_not_rounded_away() -> None:
    logits = torch.full((12,), -torch.inf)
    logits[list(DIGITS)] = 0.0
    logits[0] = math.log(5e-9)
    _, outside = expected_score(logits, DIGITS)
    assert 0 <= outside.item() < 1e-6
    # a score far outside of the vocabulary's favourite token is still read among the digits
    logits[0] = 60.0
    score, outside = expected_score(logits, DIGITS)
    assert score.item() == pytest.approx(3.0)
    assert outside.item() == pytest.approx(1.0)


def test_digit_token_ids_in_order() -> None:
    known = {digit: [token] for digit, token in zip("12345", DIGITS, strict=True)}
    assert digit_token_ids(Letters(known)) == DIGITS
    with pytest.raises(ValueError, match="splits '4' into 2 tokens"):
        digit_token_ids(Letters(known | {"4": [5, 6]}))
    with pytest.raises(ValueError, match="must all differ"):
        digit_token_ids(Letters(known | {"4": [7]}))


@pytest.mark.parametrize("text", ["Score: ", "dull.\nScore: ", "Score:", "a b Score:"])
def test_score_position_is_recognised(text: str) -> None:
    assert ends_before_digit(text)


@pytest.mark.parametrize("text", ["", "Score", "Score: 4", "Underscore:", "Score:\n", "the score is "])
def test_other_positions_are_not(text: str) -> None:
    assert not ends_before_digit(text)


def test_cap_applies_only_where_the_reasoning_states_the_failure() -> None:
    failed = "no dog.\ntop criterion: FAILED"
    assert apply_cap(4.2, failed, phrase="Top criterion: failed", cap=2) == 2
    assert apply_cap(1.3, failed, phrase="Top criterion: failed", cap=2) == 1.3
    assert apply_cap(4.2, "a dog.\nTop criterion: met", phrase="Top criterion: failed", cap=2) == 4.2
    assert apply_cap(4.2, failed, phrase=None, cap=None) == 4.2
    assert math.isnan(apply_cap(math.nan, "Top criterion: met", phrase="Top criterion: failed", cap=2))
    assert math.isnan(apply_cap(math.nan, failed, phrase="Top criterion: failed", cap=2))
