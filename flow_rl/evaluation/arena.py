"""Bradley-Terry ratings of models from pairwise battles.

Shapes: M models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit
from scipy.stats import norm

ELO_CENTRE = 1000.0
ELO_SCALE = 400.0 / math.log(10.0)  # points per unit of log-odds: 400 points are odds of 10 to 1


@dataclass(frozen=True, kw_only=True)
class Rating:
    """One model's rating: `elo` with the ends `low` and `high` of its confidence interval, in Elo points."""

    elo: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Ratings:
    """Ratings of all models, in the order of the rows of `wins`.

    Attributes:
        names: model names, length M.
        elo: ratings in Elo points, mean 1000, shape (M,).
        low: lower ends of the confidence intervals, shape (M,).
        high: upper ends, shape (M,).
        covariance: covariance of `elo` in squared points, shape (M, M); rank M - 1, because the mean is
            fixed.
    """

    names: tuple[str, ...]
    elo: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    covariance: NDArray[np.float64]

    def by_name(self) -> dict[str, Rating]:
        """Name to rating, strongest first."""
        order = np.argsort(-self.elo, kind="stable")
        return {
            self.names[i]: Rating(elo=float(self.elo[i]), low=float(self.low[i]), high=float(self.high[i]))
            for i in order
        }


def expected_win_rate(difference: ArrayLike) -> float | NDArray[np.float64]:
    """Probability that a model rated `difference` Elo points higher wins: `1 / (1 + 10^(-d/400))`.

    Args:
        difference: rating difference in Elo points, a number or any shape.

    Returns:
        Probabilities in [0, 1]: a float for a number, else an array of the same shape.
    """
    rate = expit(np.asarray(difference, dtype=np.float64) / ELO_SCALE)
    return float(rate) if rate.ndim == 0 else rate


def bradley_terry(
    wins: ArrayLike, *, names: Sequence[str] | None = None, level: float = 0.95, prior: float = 0.0
) -> Ratings:
    """Maximum-likelihood Bradley-Terry ratings on the Elo scale, `1000 + r 400 / ln 10` with `mean(r) = 0`.

    The model is `P(i beats j) = sigmoid(r_i - r_j)` (Bradley and Terry, 1952), a logistic regression solved
    by Newton's method. Intervals are normal, from the inverse of the observed information. Battles count as
    independent: ties, whose outcome varies less than a coin's, make the intervals err on the wide side;
    several battles on one prompt make them err on the narrow side, so resample prompts where that matters.

    Args:
        wins: `wins[i, j]` = battles that i won against j, a tie counting 0.5 for either side, shape (M, M),
            zeros on the diagonal.
        names: model names, length M; `model_0`, `model_1`, ... if omitted.
        level: confidence level of the intervals, in (0, 1).
        prior: imaginary ties added to every pair that met. 0 is plain maximum likelihood, which has no
            finite answer when a model won (or lost) everything; 0.5 is a mild remedy.

    Raises:
        ValueError: a malformed matrix, or battles from which ratings do not follow: models that no chain of
            battles connects, or models that never lost to, or never beat, the rest. The message names them.
    """
    counts = _checked_wins(wins, prior)
    labels = _checked_names(names, len(counts))
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie between 0 and 1, received {level}.")
    met = counts + counts.T > 0
    _require_connected(met, labels)
    counts = counts + 0.5 * prior * met
    _require_finite_ratings(counts > 0, labels)

    strength = _strengths(counts[None])
    information = _information(counts[None] + counts.T[None], _win_rates(strength))[0]
    centring = 1.0 / len(counts)
    covariance = ELO_SCALE**2 * (np.linalg.inv(information + centring) - centring)
    elo = ELO_CENTRE + ELO_SCALE * strength[0]
    reach = norm.ppf(0.5 + level / 2) * np.sqrt(np.diag(covariance))
    return Ratings(names=labels, elo=elo, low=elo - reach, high=elo + reach, covariance=covariance)


def ratings_of_many(wins: NDArray[np.float64], *, prior: float) -> NDArray[np.float64]:
    """Ratings of many sets of battles: the estimate of `bradley_terry` for each.

    Args:
        wins: credits, `wins[r, i, j]` of i against j, shape (R, M, M).
        prior: imaginary ties for every pair that met in any set; positive, so that every set has finite ratings.

    Returns:
        Elo points, mean 1000 in each set, shape (R, M).
    """
    met = (wins.sum(axis=0) + wins.sum(axis=0).T) > 0
    return ELO_CENTRE + ELO_SCALE * _strengths(wins + 0.5 * prior * met)


def _strengths(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean-free log-strengths (R, M) that maximise the likelihood of each set of wins (R, M, M).

    Newton's method with a bounded step: far from the maximum, where the likelihood is nearly flat, a whole step
    overshoots.
    """
    battles = counts + counts.swapaxes(1, 2)
    strength = np.zeros(counts.shape[:2])
    for _ in range(200):
        rate = _win_rates(strength)
        gradient = (counts - battles * rate).sum(axis=2)
        # Adding 1 / M makes the information invertible and leaves mean-free directions untouched.
        step = np.linalg.solve(_information(battles, rate) + 1.0 / counts.shape[-1], gradient[..., None])[..., 0]
        size = np.abs(step).max(axis=1, keepdims=True)
        strength += step * np.minimum(1.0, 1.0 / np.maximum(size, 1e-12))
        if size.max() < 1e-10:
            break
    return strength - strength.mean(axis=1, keepdims=True)


def _win_rates(strength: NDArray[np.float64]) -> NDArray[np.float64]:
    """`P(i beats j)`, shape (R, M, M), from log-strengths (R, M)."""
    return expit(strength[:, :, None] - strength[:, None, :])


def _information(battles: NDArray[np.float64], rate: NDArray[np.float64]) -> NDArray[np.float64]:
    """Observed information: a graph Laplacian with weights `n_ij p_ij (1 - p_ij)`, shape (R, M, M)."""
    weights = battles * rate * (1.0 - rate)
    return weights.sum(axis=2)[..., None] * np.eye(weights.shape[-1]) - weights


def _checked_wins(wins: ArrayLike, prior: float) -> NDArray[np.float64]:
    counts = np.asarray(wins, dtype=np.float64)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or len(counts) < 2:
        raise ValueError(f"wins must be a square matrix of at least 2 models, received shape {counts.shape}.")
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise ValueError("wins must hold finite counts of 0 or more; leave pairs that never met at 0.")
    if np.diag(counts).any():
        raise ValueError("wins has entries on its diagonal: a model cannot battle itself. Set them to 0.")
    if not math.isfinite(prior) or prior < 0:
        raise ValueError(f"prior is a number of imaginary ties, 0 or more; received {prior}.")
    return counts


def _checked_names(names: Sequence[str] | None, models: int) -> tuple[str, ...]:
    labels = tuple(names) if names is not None else tuple(f"model_{i}" for i in range(models))
    if len(labels) != models or len(set(labels)) != models:
        raise ValueError(f"names must be {models} different names, one a row of wins; received {list(labels)}.")
    return labels


def _require_connected(met: NDArray[np.bool_], labels: tuple[str, ...]) -> None:
    reached = _reachable(met)[0]
    if not reached.all():
        one = [label for label, there in zip(labels, reached, strict=True) if there]
        other = [label for label, there in zip(labels, reached, strict=True) if not there]
        raise ValueError(
            f"No chain of battles connects {one} with {other}, so their ratings cannot be compared. "
            "Add battles between them."
        )


def _require_finite_ratings(beat: NDArray[np.bool_], labels: tuple[str, ...]) -> None:
    """Ford's condition (1957): the maximum exists iff every model reaches every other along wins."""
    reach = _reachable(beat)
    if reach.all():
        return
    # The model that reaches the fewest belongs to a set that never beat anyone outside of it.
    bottom = reach[int(reach.sum(axis=1).argmin())]
    losers = [label for label, inside in zip(labels, bottom, strict=True) if inside]
    others = [label for label, inside in zip(labels, bottom, strict=True) if not inside]
    raise ValueError(
        f"{losers} never won or tied a battle against {others}: maximum-likelihood ratings are infinitely "
        "far apart. Add battles, or pass prior=0.5 (half an imaginary tie for every pair that met)."
    )


def _reachable(edges: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Transitive closure: `out[i, j]` = a path leads from i to j, shape (M, M)."""
    reach = edges | np.eye(len(edges), dtype=bool)
    for k in range(len(edges)):
        reach |= reach[:, k : k + 1] & reach[k : k + 1, :]
    return reach
