"""Means with intervals that are resampled by prompt.

Images of one prompt resemble each other in how hard they are, so the prompt, not the image, is the unit
that is resampled: treating every image as independent makes intervals too narrow.

Shapes: P prompts, M repeated samples of a prompt, R bootstrap resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm
from scipy.stats import t as student_t

# Upper bound on the entries of one block of resampled indices: 2**22 int64 entries are 32 MiB, whatever P is.
_BLOCK_ENTRIES = 2**22


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its confidence interval.

    Attributes:
        mean: the estimate, in the unit of the values.
        low: lower end of the interval.
        high: upper end of the interval.
        n: number of prompts the estimate rests on.
    """

    mean: float
    low: float
    high: float
    n: int

    def __post_init__(self) -> None:
        ends = (self.low, self.mean, self.high)
        if not all(math.isfinite(value) for value in ends) or not self.low <= self.mean <= self.high:
            raise ValueError(f"An interval needs finite low <= mean <= high, received {ends}.")


def bootstrap_mean(values: ArrayLike, *, resamples: int = 2000, level: float = 0.95, seed: int = 0) -> Interval:
    """Mean over prompts with a bootstrap interval.

    Prompts are drawn with replacement; each brings all of its samples. The interval is the expanded
    percentile interval of Hesterberg (2015, "What Teachers Should Know About the Bootstrap"):
    the plain percentile interval is too narrow for few prompts, by the factor that separates `sqrt((n-1)/n)
    z` from Student's `t`, so its tail probability is lowered by just that much.

    Args:
        values: scores, shape (P,) or (P, M): a row is a prompt, a column a repeated sample of it. Rows with
            a NaN (a sample that could not be scored) are dropped; `n` counts the rows that are left.
        resamples: number of bootstrap resamples R.
        level: confidence level, in (0, 1).
        seed: seed of the resampling; the result is a pure function of the arguments.

    Raises:
        ValueError: fewer than two rows without NaN, infinite values, or an argument out of range.
    """
    return _interval(_prompt_means(values, "values"), resamples=resamples, level=level, seed=seed)


def paired_gain(
    before: ArrayLike, after: ArrayLike, *, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Mean of `after - before` over the same prompts, with a bootstrap interval of the paired differences.

    Pairing removes how hard each prompt is from the comparison, so the interval is narrower than one from
    two independent samples whenever the two models find the same prompts hard.

    Args:
        before: scores of the first model, shape (P,) or (P, M).
        after: scores of the second model on the same prompts in the same order, shape (P,) or (P, M'). M'
            may differ from M.
        resamples: number of bootstrap resamples R.
        level: confidence level, in (0, 1).
        seed: seed of the resampling.

    Raises:
        ValueError: different numbers of prompts, fewer than two pairs without NaN, infinite values, or an
            argument out of range.
    """
    first, second = _prompt_means(before, "before"), _prompt_means(after, "after")
    if first.shape != second.shape:
        raise ValueError(
            f"A paired gain compares the same prompts: received {first.size} rows before and "
            f"{second.size} after. "
            "Score both models on one list of prompts, with NaN where a sample could not be scored."
        )
    return _interval(second - first, resamples=resamples, level=level, seed=seed)


def gain_share(
    before: ArrayLike,
    reference: ArrayLike,
    after: ArrayLike,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval | None:
    """How much of a reference's gain another model has: `mean(after - before) / mean(reference - before)`.

    Args:
        before: scores of the model that both started from, shape (P,) or (P, M).
        reference: scores of the model whose gain counts as 1, such as a teacher, on the same prompts.
        after: scores of the other model on the same prompts.
        resamples: number of bootstrap resamples R; a resample takes all three models of a prompt.
        level: confidence level, in (0, 1).
        seed: seed of the resampling.

    Returns:
        the share with its interval; None where the reference's gain is not above zero for sure, as a share of
        nothing says nothing.

    Raises:
        ValueError: see `paired_gain`.
    """
    if paired_gain(before, reference, resamples=resamples, level=level, seed=seed).low <= 0:
        return None
    start, teacher, student = (
        _prompt_means(v, n) for v, n in ((before, "before"), (reference, "reference"), (after, "after"))
    )
    if start.shape != student.shape:
        raise ValueError(f"A share compares the same prompts: received {start.size} and {student.size} rows.")
    gains = np.stack([student - start, teacher - start], axis=1)
    gains = gains[np.isfinite(gains).all(axis=1)]
    n = len(gains)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    sums = draws @ gains
    sums = sums[sums[:, 1] > 0]  # a resample in which the reference gains nothing has no share
    tail = expanded_tail(n, level)
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [tail, 1 - tail])
    share = float(gains[:, 0].sum() / gains[:, 1].sum())
    return Interval(mean=share, low=min(float(low), share), high=max(float(high), share), n=n)


def mean_of_gains(
    differences: Sequence[ArrayLike], *, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Plain mean of several tasks' mean differences, each resampled by its own prompts.

    Args:
        differences: one array (P_t,) of per-prompt differences a task; NaN is left out.
        resamples: number of bootstrap resamples R.
        level: confidence level, in (0, 1).
        seed: seed of the resampling.

    Raises:
        ValueError: no task, or a task with fewer than two prompts.
    """
    kept = [_prompt_means(values, "differences") for values in differences]
    kept = [values[~np.isnan(values)] for values in kept]
    if not kept or min(map(len, kept)) < 2:
        raise ValueError(f"Each task needs at least 2 prompts without NaN, received {[len(v) for v in kept]}.")
    mean = float(np.mean([values.mean() for values in kept]))
    drawn = np.mean([_resampled_means(values, resamples, seed + i) for i, values in enumerate(kept)], axis=0)
    tail = expanded_tail(min(map(len, kept)), level)
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(mean=mean, low=min(float(low), mean), high=max(float(high), mean), n=sum(map(len, kept)))


def _prompt_means(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """Mean of each row, shape (P,), NaN where the row has a NaN."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim not in (1, 2):
        raise ValueError(f"{name} must have shape (prompts,) or (prompts, samples), received {array.shape}.")
    if array.size == 0:
        raise ValueError(f"{name} is empty (shape {array.shape}): there is nothing to average.")
    if np.isinf(array).any():
        raise ValueError(f"{name} has {int(np.isinf(array).sum())} infinite entries; mark missing scores with NaN.")
    return array if array.ndim == 1 else array.mean(axis=1)


def _interval(prompt_means: NDArray[np.float64], *, resamples: int, level: float, seed: int) -> Interval:
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie between 0 and 1, received {level}. Use 0.95 for a 95 % interval.")
    if resamples < 100:
        raise ValueError(f"resamples must be at least 100 for the tails to mean anything, received {resamples}.")
    kept = prompt_means[~np.isnan(prompt_means)]
    n = kept.size
    if n < 2:
        raise ValueError(
            f"An interval resampled by prompt needs at least 2 prompts without NaN, "
            f"received {n} of {prompt_means.size}."
        )
    mean = float(kept.mean())
    tail = expanded_tail(n, level)
    low, high = np.quantile(_resampled_means(kept, resamples, seed), [tail, 1.0 - tail])
    # Rounding alone can put the mean of equal values outside of its own resamples.
    return Interval(mean=mean, low=min(float(low), mean), high=max(float(high), mean), n=n)


def _resampled_means(kept: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """Means of the resamples, shape (R,)."""
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK_ENTRIES // kept.size)
    means = [
        kept[generator.integers(kept.size, size=(min(block, resamples - start), kept.size))].mean(axis=1)
        for start in range(0, resamples, block)
    ]
    return np.concatenate(means)


def expanded_tail(n: int, level: float) -> float:
    """Probability to cut from each end of the bootstrap distribution of `n` prompts."""
    return float(norm.cdf(-math.sqrt(n / (n - 1)) * student_t.ppf(0.5 + level / 2, n - 1)))
