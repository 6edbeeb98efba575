"""What a reward model minimises: pure functions of logits.

Pointwise (arXiv 2606.27608, section 2, and the readout of this project): `CE(reasoning, digit) + lambda (R - y)^2`.
Pairwise: Bradley-Terry, `-log sigmoid(R_w - R_l)`, the alternative that the paper rejects.

Shapes: N samples, P pairs, A predictions of the assistant's turn, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flow_rl.rewards.conversation import IGNORED
from flow_rl.rewards.readout import digit_readout


def turn_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean next-token cross-entropy of each turn, so a long reasoning weighs no more than a short one.

    Args:
        logits: shape (N, A, V), any float dtype.
        labels: int64 (N, A), `IGNORED` where there is none.

    Returns:
        float32 (N,); 0 for a turn without labels.
    """
    wanted = labels != IGNORED
    losses = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return losses.sum(1) / wanted.sum(1).clamp(min=1)


def pointwise_loss(
    logits: Tensor,
    labels: Tensor,
    digit_index: Tensor,
    targets: Tensor,
    digit_token_ids: Sequence[int],
    *,
    cross_entropy: float,
    regression: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean over samples of `cross_entropy * CE + regression * (R - y)^2`.

    A score between two digits, such as the mean of several people's, is learnt as the two digits with the
    probabilities whose expectation it is: CE and squared error then have the same minimum.

    Args:
        logits: shape (N, A, V).
        labels: int64 (N, A); at the score's position the nearest digit.
        digit_index: which of the A predictions is the score's, int64 (N,).
        targets: y, human scores in [1, 5], shape (N,).
        digit_token_ids: ids of "1".."5".
        cross_entropy: weight of the turn's cross-entropy.
        regression: lambda.

    Returns:
        (loss, metrics): a scalar, and detached scalars `cross_entropy`, `squared_error`, `outside_mass`.
    """
    scores, log_inside = _read(logits, digit_index, digit_token_ids)
    entropy = turn_cross_entropy(logits, labels)
    entropy = entropy + _between_digits(logits, labels, digit_index, targets, digit_token_ids)
    squared = (scores - targets.float()) ** 2
    loss = (cross_entropy * entropy + regression * squared).mean()
    return loss, _metrics(cross_entropy=entropy, squared_error=squared, outside_mass=-torch.expm1(log_inside))


def pairwise_loss(
    logits: Tensor,
    labels: Tensor,
    digit_index: Tensor,
    digit_token_ids: Sequence[int],
    *,
    cross_entropy: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean over pairs of the Bradley-Terry loss, plus what keeps the answer readable.

    Bradley-Terry alone sees R, which does not change as probability leaks from the digits to other tokens; a model
    trained so would stop to write digits. So the cross-entropy covers the reasoning, where there is one, and the event
    "some digit" at the score's position, without saying which.

    Args:
        logits: the chosen samples first, then the rejected ones in the same order, shape (2 P, A, V).
        labels: int64 (2 P, A), `IGNORED` at the score's position.
        digit_index: int64 (2 P,).
        digit_token_ids: ids of "1".."5".
        cross_entropy: weight of the cross-entropy.

    Returns:
        (loss, metrics): a scalar, and detached scalars `bradley_terry`, `cross_entropy`, `accuracy`, `outside_mass`.
    """
    scores, log_inside = _read(logits, digit_index, digit_token_ids)
    chosen, rejected = scores.chunk(2)
    preference = -F.logsigmoid(chosen - rejected)
    entropy = turn_cross_entropy(logits, labels) - log_inside
    loss = preference.mean() + cross_entropy * entropy.mean()
    return loss, _metrics(
        bradley_terry=preference,
        cross_entropy=entropy,
        accuracy=(chosen > rejected).float(),
        outside_mass=-torch.expm1(log_inside),
    )


def _between_digits(
    logits: Tensor, labels: Tensor, digit_index: Tensor, targets: Tensor, digit_token_ids: Sequence[int]
) -> Tensor:
    """What two digits in place of the nearest one add to each turn's mean cross-entropy, (N,); 0 for whole scores."""
    rows = torch.arange(len(logits), device=logits.device)
    log_p = logits[rows, digit_index].float().log_softmax(-1)
    # One view a digit, as in `digit_readout`: the host waits for no copy of indices.
    of_digits = torch.stack([log_p[:, token] for token in digit_token_ids], dim=-1)
    scores = torch.arange(1, len(digit_token_ids) + 1, device=logits.device)
    share = (1 - (targets.float()[:, None] - scores).abs()).clamp_min(0)  # on the two neighbours, by distance
    both = -(share * of_digits).sum(-1)
    nearest = F.nll_loss(log_p, labels[rows, digit_index], reduction="none")
    return (both - nearest) / (labels != IGNORED).sum(1).clamp(min=1)


def _read(logits: Tensor, digit_index: Tensor, digit_token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Score and log-probability of "some digit" of each sample, both (N,)."""
    rows = torch.arange(len(logits), device=logits.device)
    return digit_readout(logits[rows, digit_index], digit_token_ids)


def _metrics(**values: Tensor) -> dict[str, Tensor]:
    return {name: value.detach().float().mean() for name, value in values.items()}
