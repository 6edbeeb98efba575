"""A suggested table of weights by category, from the raw scores of the base, with its reasons.

Three things are looked at, each category and reward by itself:

    spread     mean deviation s in a group: Eq. 13 divides it away, but below the floor of the deviation a reward has
               nothing to say; counts as s / (s + floor)
    headroom   h = 5 - mean score: a saturated reward has nothing to teach; counts as min(1, h)
    agreement  mean Spearman rho with each other reward in a group: rewards that always agree are one reward twice;
               counts as 1 / (1 + sum of positive rho)

The weight is the share of the product, with a least share for every reward, so that a suggestion switches none off.
Only a reward that scored no image of a category, such as one of portraits in a category without people, gets 0 there.
This is our own rule of thumb; arXiv 2606.27608 does not say how its tables were made.

Shapes: P prompts, G images a prompt, K rewards.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flow_rl.curation.scores import CuratedScores
from flow_rl.files import put_text
from flow_rl.rewards.base import SCORE_MAX
from flow_rl.rl.settings import AdvantageSettings
from flow_rl.rl.weight_table import DEFAULT

#: deviation below which advantages are scaled down anyway
_FLOOR = AdvantageSettings().std_floor
#: headroom, in points, from which more makes no difference
_ROOM = 1.0
#: share of equal weights that every reward keeps
LEAST_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """One row.

    Attributes:
        category: its name.
        prompts: how many it rests on.
        weights: by reward; they sum to 1.
        reasons: one line a reward.
    """

    category: str
    prompts: int
    weights: dict[str, float]
    reasons: dict[str, str]


def propose_table(curated: CuratedScores) -> list[Suggestion]:
    """A row for each category, and `default` from all prompts together.

    Args:
        curated: scores of the prompts that are kept.
    """
    found = []
    for category in sorted(set(curated.categories)):
        rows = [row for row, c in enumerate(curated.categories) if c == category]
        found.append(propose_row(category, curated.scores[rows], curated.reward_names))
    return [*found, propose_row(DEFAULT, curated.scores, curated.reward_names)]


def propose_row(category: str, scores: Tensor, names: tuple[str, ...]) -> Suggestion:
    """Weights for one category's scores (P, G, K)."""
    scores = scores.double()
    spread = in_group_deviation(scores)
    headroom = SCORE_MAX - scores.flatten(0, 1).nanmean(dim=0)
    agreement = in_group_agreement(scores)
    worth = spread / (spread + _FLOOR) * (headroom / _ROOM).clamp(0, 1)
    worth = worth.nan_to_num() / (1 + agreement.clamp_min(0).nan_to_num().sum(dim=1))
    judged = (~scores.isnan()).flatten(0, 1).any(dim=0)
    if not judged.any():
        judged = torch.ones_like(judged)
    equal = judged.double() / judged.sum()
    shares = worth / worth.sum() if worth.sum() > 0 else equal
    weights = rounded(LEAST_SHARE * equal + (1 - LEAST_SHARE) * shares)
    reasons = {
        name: _reason(k, names, float(spread[k]), float(headroom[k]), agreement[k]) for k, name in enumerate(names)
    }
    return Suggestion(
        category=category, prompts=len(scores), weights=dict(zip(names, weights, strict=True)), reasons=reasons
    )


def in_group_deviation(scores: Tensor) -> Tensor:
    """Mean population deviation within a group, shape (K,); NaN for a reward that scored no two images of any."""
    valid = ~scores.isnan()
    count = valid.sum(dim=1)
    mean = scores.nan_to_num().sum(dim=1) / count
    centred = torch.where(valid, scores - mean.unsqueeze(1), 0.0)
    deviation = (centred.square().sum(dim=1) / count).sqrt()
    return torch.where(count >= 2, deviation, torch.nan).nanmean(dim=0)


def in_group_agreement(scores: Tensor) -> Tensor:
    """Mean Spearman correlation of each two rewards within a group.

    Groups where either is constant, or both scored fewer than three images, are left out.

    Returns:
        shape (K, K), 0 on the diagonal, NaN where no group tells.
    """
    k = scores.shape[2]
    found = torch.zeros(k, k, dtype=torch.float64)
    for a in range(k):
        for b in range(a):
            values = [rho for group in scores if (rho := _spearman(group[:, a], group[:, b])) is not None]
            found[a, b] = found[b, a] = sum(values) / len(values) if values else torch.nan
    return found


def _spearman(x: Tensor, y: Tensor) -> float | None:
    both = ~(x.isnan() | y.isnan())
    if int(both.sum()) < 3:
        return None
    ranks = [mid_ranks(values[both]) for values in (x, y)]
    a, b = (r - r.mean() for r in ranks)
    norm = (a.square().sum() * b.square().sum()).sqrt()
    return float((a * b).sum() / norm) if norm > 0 else None


def mid_ranks(values: Tensor) -> Tensor:
    """Ranks from 1, ties sharing the mean of theirs, float64 (G,)."""
    below = (values.unsqueeze(0) < values.unsqueeze(1)).sum(dim=1)
    equal = (values.unsqueeze(0) == values.unsqueeze(1)).sum(dim=1)
    return below + (equal.double() + 1) / 2


def rounded(weights: Tensor) -> list[float]:
    """Hundredths that sum to exactly 1: those whose rounding lost most are rounded up."""
    hundredths = (weights * 100).floor()
    short = round(100 - float(hundredths.sum()))
    order = sorted(range(len(weights)), key=lambda k: (-(weights[k] * 100 - hundredths[k]).item(), k))
    for k in order[:short]:
        hundredths[k] += 1
    return [int(value) / 100 for value in hundredths.tolist()]


def _reason(k: int, names: tuple[str, ...], spread: float, headroom: float, agreement: Tensor) -> str:
    if spread != spread:
        return "scored no two images of a group: nothing is known of it"
    parts = [f"spread {spread:.2f}" + (" (says little inside a group)" if spread < _FLOOR else "")]
    parts.append(f"headroom {headroom:.2f}" + (" (nearly saturated)" if headroom < _ROOM / 2 else ""))
    for other, name in enumerate(names):
        rho = float(agreement[other])
        if other != k and rho == rho:
            note = " (much the same)" if rho > 0.7 else " (pulls against it)" if rho < -0.3 else ""
            parts.append(f"agrees {rho:+.2f} with {name}{note}")
    return ", ".join(parts)


def write_proposal(path: str, table: list[Suggestion]) -> None:
    """Write the table as YAML that `callbacks.CategoryWeightCalibration` takes, reasons as comments.

    Raises:
        SettingError: a table is there that was edited, or that was not written here.
    """
    lines = [
        "# Suggested weights of the rewards by category: to look at, not a result. Change what you know better.",
        "# Spread is the mean deviation in a group, headroom 5 minus the mean score, both of the base's images.",
    ]
    for row in table:
        lines += ["", f"{_quoted(row.category)}:  # {row.prompts} prompts"]
        lines += [f"  {_quoted(name)}: {weight:.2f}  # {row.reasons[name]}" for name, weight in row.weights.items()]
    put_text(path, "\n".join(lines) + "\n")


def _quoted(name: str) -> str:
    """The name as YAML reads it back, whatever it is."""
    return (
        name
        if name.isidentifier() and name.lower() not in ("null", "true", "false", "yes", "no", "on", "off")
        else repr(name)
    )
