"""From a language model's logits to a score: the expected value over the five digits.

The model ends its answer with a line `Score: <digit>`. At the position that predicts the digit the score is
`R = sum_s s p(s)`, with p renormalised over S = {1..5} (arXiv 2606.27608, section 2): smoother than the
digit itself, and differentiable. The probability outside of S is returned along with it, never thrown away unseen.

Shapes: V vocabulary; `...` any leading dimensions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DIGITS = ("1", "2", "3", "4", "5")
#: what stands between the reasoning and the digit; it ends in a blank so that the digit is a token by itself
SCORE_TEMPLATE = "\nScore: "
#: the same without a reasoning before it
DIRECT_TEMPLATE = "Score: "
_BEFORE_DIGIT = re.compile(r"(?:^|\s)Score:[ \t]?\Z")


def nearest_digit(score: float) -> int:
    """The digit that states a score in [1, 5]; halves go up."""
    return min(5, max(1, math.floor(score + 0.5)))


def digit_token_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids of "1".."5", in that order.

    Args:
        tokenizer: of transformers, or anything with its `encode(text, add_special_tokens=...)`.

    Raises:
        ValueError: a digit that is not one token, or two digits that share one: no score could be read there.
    """
    found = [tokenizer.encode(digit, add_special_tokens=False) for digit in DIGITS]
    for digit, ids in zip(DIGITS, found, strict=True):
        if len(ids) != 1:
            raise ValueError(
                f"The tokenizer splits '{digit}' into {len(ids)} tokens; the score is read from the probabilities of "
                f"single tokens for {', '.join(DIGITS)}. Use a tokenizer that has each of them."
            )
    flat = tuple(ids[0] for ids in found)
    if len(set(flat)) != len(flat):
        raise ValueError(f"The tokenizer gives the digits {', '.join(DIGITS)} the ids {flat}: they must all differ.")
    return flat


def expected_score(logits: Tensor, digit_token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Expected score over the digits, and how much of the model's belief lay elsewhere.

    Args:
        logits: at the position that predicts the digit, any float dtype, shape (..., V).
        digit_token_ids: ids of "1".."5".

    Returns:
        (score, outside_mass), both float32 of shape (...,): the score in [1, 5], and 1 minus the probability of the
        five digits in the full softmax, in [0, 1].
    """
    scores, log_inside = digit_readout(logits, digit_token_ids)
    # expm1 keeps masses far below float32's spacing near 1
    return scores, -torch.expm1(log_inside.clamp(max=0.0))


def digit_readout(logits: Tensor, digit_token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """As `expected_score`, with the log-probability of "some digit", which a loss can use.

    Args:
        logits: shape (..., V).
        digit_token_ids: ids of "1".."5".

    Returns:
        (score, log_inside), float32 of shape (...,): log_inside is at most 0 up to rounding.
    """
    logits = logits.float()
    # One view a digit: indices would have to be copied to the device, for which the host waits.
    chosen = torch.stack([logits[..., token] for token in digit_token_ids], dim=-1)
    values = torch.arange(1, len(digit_token_ids) + 1, dtype=torch.float32, device=logits.device)
    score = (chosen.softmax(-1) * values).sum(-1)
    return score, chosen.logsumexp(-1) - logits.logsumexp(-1)


def ends_before_digit(text: str) -> bool:
    """Tell whether the text ends with the score line's template, so that the next token is the score."""
    return _BEFORE_DIGIT.search(text) is not None


def apply_cap(score: float, reasoning: str, *, phrase: str | None, cap: float | None) -> float:
    """The priority hierarchy's cap: where the reasoning states that the top criterion failed, min(R, cap).

    Args:
        score: in [1, 5].
        reasoning: what the model wrote before the score.
        phrase: the statement to look for, upper and lower case alike; None for a rubric without a cap.
        cap: the highest score left then.
    """
    if phrase is None or cap is None or phrase.casefold() not in reasoning.casefold():
        return score
    return min(score, cap)
