"""Is the reward being hacked? Decisions on a fixed panel of prompts, made again and again as training goes on.

Every decision is a one-sided paired t-test over prompts, so a change must stand out from how differently prompts
react. A run is looked at many times, and a test at a fixed level would alert sooner or later by chance: the n-th
look may use `error_rate / (n (n + 1))`, shared among its comparisons. These add up to the error rate over a run of
any length: where nothing is wrong, that bounds the chance of any alert (as far as the t-test holds).

Shapes: P prompts, M images a prompt, N = P M samples, K rewards or monitors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.stats import ttest_1samp
from torch import Tensor

from flow_rl.monitoring.drift import by_prompt
from flow_rl.rewards.composite import weighted_mean


@dataclass(frozen=True, kw_only=True)
class Band:
    """How far a measure may move before that is worth an alert, relative to its mean before training.

    Attributes:
        low: the lowest change allowed: -0.3 allows 30 % less.
        high: the highest change allowed: 0.3 allows 30 % more.
    """

    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        if not self.low <= 0 <= self.high:
            raise ValueError(f"A band must contain 0, no change; received low {self.low} and high {self.high}.")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one test found.

    Attributes:
        kind: "hacking", or the name of the measure that drifted.
        since: the look it compares with; 0 is before training.
        p: chance to see this much if nothing were wrong, times the number of comparisons of this look.
        alert: whether that is too little to be chance.
        changes: mean changes since then, by name: in points of the 1..5 scale for hacking, relative for a measure.
    """

    kind: str
    since: int
    p: float
    alert: bool
    changes: Mapping[str, float]


def find_hacking(
    proxy: Sequence[Tensor],
    panel: Sequence[Tensor],
    *,
    weights: Tensor,
    members: int,
    margin: float = 0.0,
    error_rate: float = 0.05,
) -> Finding:
    """Has the training reward risen while the scorers that are never trained on fell, at the last look?

    The last look is compared with the first, and with the looks 1, 2, 4, ... before it: a run may rise honestly at
    first and be hacked later. For an alert both must hold against one of them: the proxy rose, and the panel fell by
    more than the margin.

    Args:
        proxy: raw training rewards of each look, from the first, each (N, K); NaN where masked.
        panel: raw scores of the monitors of the same images, each (N, J); NaN where one could not score.
        weights: of the rewards in the proxy, non-negative, shape (N, K).
        members: M, images a prompt, side by side.
        margin: a fall of the panel up to this, in points of the 1..5 scale, is no reason for an alert.
        error_rate: bound on the chance of any false alert in the whole run.

    Raises:
        ValueError: fewer than two looks, or not one panel look a proxy look.
    """
    last = len(proxy) - 1
    if last < 1 or len(panel) != len(proxy):
        raise ValueError(f"Expected two looks or more of both; received {len(proxy)} of proxy, {len(panel)} of panel.")
    equal = torch.ones_like(panel[last])
    compared = references(last)
    findings = []
    for since in compared:
        rise = paired_changes(proxy[since], proxy[last], weights, members)
        fall = paired_changes(panel[since], panel[last], equal, members)
        # Both must hold: the p-value of "one of them does not" is the larger one, without any correction.
        p = max(p_above(rise, 0.0), p_above(-fall, margin)) * len(compared)
        changes = {"proxy": float(rise.nanmean()), "panel": float(fall.nanmean())}
        alert = p <= allowance(last, error_rate)
        findings.append(Finding(kind="hacking", since=since, p=min(p, 1.0), alert=alert, changes=changes))
    return min(findings, key=lambda finding: finding.p)


def find_drift(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    bands: Mapping[str, Band],
    *,
    look: int,
    error_rate: float = 0.05,
) -> list[Finding]:
    """Which measures have left their band since the first look?

    Args:
        before: measures of the first look by name, each (P,), positive; NaN where there is none.
        after: of this look, of the same prompts.
        bands: allowed relative changes of the means, by measure.
        look: which look this is, from 1.
        error_rate: bound on the chance of any false alert in the whole run.

    Returns:
        One finding a band, in the bands' order.
    """
    findings = []
    for name, band in bands.items():
        base = before[name].double().nanmean().clamp_min(1e-6)  # a black image is 0 bright
        change = (after[name].double() - before[name].double()) / base
        p = min(p_above(change, band.high), p_above(-change, -band.low)) * 2 * len(bands)
        alert = p <= allowance(look, error_rate)
        changes = {name: float(change.nanmean())}
        findings.append(Finding(kind=name, since=0, p=min(p, 1.0), alert=alert, changes=changes))
    return findings


def allowance(look: int, error_rate: float) -> float:
    """The share of the error rate that the `look`-th look may use, from 1: they add up to the error rate."""
    return error_rate / (look * (look + 1))


def references(look: int) -> tuple[int, ...]:
    """The looks that the `look`-th is compared with, in order: 0, and those 1, 2, 4, ... before it."""
    return tuple(sorted({0} | {look - 2**j for j in range(look.bit_length()) if look >= 2**j}))


def paired_changes(before: Tensor, after: Tensor, weights: Tensor, members: int) -> Tensor:
    """Weighted change of scores by prompt, in points, (P,); NaN where nothing can be compared.

    A scorer counts where it scored a sample both times, with the weights renormalised: a scorer that fails in one look
    must not look like a rise or a fall.

    Args:
        before: raw scores (N, K), NaN where missing.
        after: of the same prompts and noises.
        weights: non-negative, shape (N, K).
        members: images a prompt, side by side.
    """
    change = after.double() - before.double()
    return by_prompt(weighted_mean(change, weights.double()), members)


def p_above(values: Tensor, bound: float) -> float:
    """One-sided p-value of Student's t-test that the mean of `values` lies above `bound`.

    Args:
        values: one a prompt, shape (P,); NaN entries are left out.
        bound: the mean under the null hypothesis; infinity gives 1.

    Returns:
        In [0, 1]; 1 with fewer than two values.
    """
    kept = values[~values.isnan()].double()
    if len(kept) < 2 or math.isinf(bound):
        return 1.0
    excess, deviation = float(kept.mean()) - bound, float(kept.std())
    if deviation == 0.0:  # no test statistic: every prompt agrees
        return 0.0 if excess > 0 else 1.0
    return float(ttest_1samp(kept.numpy(), bound, alternative="greater").pvalue)
