"""The reward-range filter: keep prompts whose images the composite reward tells apart (arXiv 2606.27608, section 3).

The composite is the weighted mean of RAW scores: on z-scores every group has the same spread, and its range says
nothing. A prompt stays where max - min over its group is above the threshold.

Shapes: P prompts, G images a prompt, K rewards, N samples (all groups together).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flow_rl.rewards.composite import weighted_mean


@dataclass(frozen=True, kw_only=True)
class CategoryKeep:
    """What a threshold leaves of a category.

    Attributes:
        prompts: how many there are.
        kept: how many stay.
        unscored: how many were dropped for having fewer than two images with a score.
        ranges: of its prompts, ascending, NaN left out.
    """

    prompts: int
    kept: int
    unscored: int
    ranges: tuple[float, ...]

    @property
    def rate(self) -> float:
        """Share of the prompts that stay."""
        return self.kept / self.prompts


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which prompts a threshold keeps.

    Attributes:
        threshold: in points of the 1..5 scale; a range must exceed it.
        kept: ids, ascending.
        categories: what is left of each, by name.
    """

    threshold: float
    kept: tuple[int, ...]
    categories: dict[str, CategoryKeep]


def group_ranges(composite: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Range of the composite in each group.

    Args:
        composite: raw composite of each sample, NaN where not scored, shape (N,).
        groups: integer id of each sample's group, shape (N,), in any order.

    Returns:
        the distinct groups, ascending, and max - min of each, NaN where fewer than two samples have a score.
    """
    distinct, index = groups.unique(return_inverse=True)
    scored = ~composite.isnan()
    ends = []
    for reduce, neutral in (("amax", -math.inf), ("amin", math.inf)):
        start = composite.new_full((len(distinct),), neutral)
        ends.append(start.scatter_reduce(0, index, torch.where(scored, composite, neutral), reduce=reduce))
    count = torch.zeros(len(distinct)).scatter_add(0, index, scored.float())
    return distinct, torch.where(count >= 2, ends[0] - ends[1], torch.nan)


def composite_ranges(scores: Tensor, weights: Tensor) -> Tensor:
    """Range of the composite over each prompt's images.

    Where a reward masked an image, the others' weights are scaled up for it.

    Args:
        scores: raw, NaN where masked, shape (P, G, K).
        weights: of each prompt's rewards, rows summing to 1, shape (P, K).

    Returns:
        float64 (P,), NaN where fewer than two images have a score.
    """
    p, g, k = scores.shape
    repeated = weights.double().repeat_interleave(g, dim=0)
    composite = weighted_mean(scores.double().reshape(p * g, k), repeated)
    return group_ranges(composite, torch.arange(p).repeat_interleave(g))[1]


def select_prompts(
    ids: Sequence[int], categories: Sequence[str], ranges: Tensor, threshold: float, *, whole: bool = True
) -> Selection:
    """Keep the prompts whose range exceeds the threshold. The order of the prompts makes no difference.

    Args:
        ids: of the prompts, length P.
        categories: of the prompts, length P.
        ranges: of the composite, NaN where not known, shape (P,).
        threshold: in points of the 1..5 scale.
        whole: refuse to lose a category.

    Raises:
        ValueError: a threshold outside [0, 4), or a category that would lose all its prompts.
    """
    if not 0 <= threshold < 4:
        raise ValueError(
            f"The threshold is {threshold}; a range on the 1..5 scale lies in [0, 4], so take 0 to below 4."
        )
    values = ranges.tolist()
    rows: dict[str, list[int]] = {}
    for row, category in enumerate(categories):
        rows.setdefault(category, []).append(row)
    found = {}
    for category in sorted(rows):
        own = [values[row] for row in rows[category]]
        known = sorted(value for value in own if not math.isnan(value))
        found[category] = CategoryKeep(
            prompts=len(own),
            kept=sum(value > threshold for value in known),
            unscored=len(own) - len(known),
            ranges=tuple(known),
        )
    if whole:
        _check_categories(found, threshold)
    kept = tuple(sorted(i for i, value in zip(ids, values, strict=True) if value > threshold))
    return Selection(threshold=threshold, kept=kept, categories=found)


def threshold_to_keep(ranges: Sequence[float], count: int) -> float | None:
    """The largest threshold of three decimals that keeps at least `count` prompts; None if even 0 keeps fewer."""
    if len(ranges) < count:
        return None
    reached = sorted(ranges, reverse=True)[count - 1]
    threshold = math.floor(reached * 1000) / 1000
    if threshold >= reached:
        threshold = round(threshold - 0.001, 3)
    return threshold if threshold >= 0 else None


def _check_categories(found: dict[str, CategoryKeep], threshold: float) -> None:
    lost = {name: category for name, category in found.items() if category.kept == 0}
    if not lost:
        return
    lines = [f"A threshold of {threshold:g} leaves nothing of {', '.join(repr(name) for name in lost)}."]
    lines += [f"'{name}': {_advice(category)}" for name, category in lost.items()]
    lines.append("Lower the threshold, or take the category out of the prompt file.")
    raise ValueError("\n".join(lines))


def _advice(category: CategoryKeep) -> str:
    if not category.ranges:
        return f"none of its {category.prompts} prompts has two images with a score: look at the rewards."
    options = []
    for count in sorted({1, math.ceil(category.prompts / 4), math.ceil(category.prompts / 2)}):
        value = threshold_to_keep(category.ranges, count)
        if value is not None:
            kept = sum(r > value for r in category.ranges)
            options.append(f"{value:g} would keep {kept} of {category.prompts}")
    if not options:
        return f"all of its {category.prompts} prompts have a range of 0, which no threshold keeps."
    return f"its widest range is {category.ranges[-1]:.3f}; {', '.join(dict.fromkeys(options))}."
