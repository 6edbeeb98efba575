"""Several rewards as one, each with its weight and scale.

Shapes: N samples, K parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from flow_rl.rewards.asking import ask, submit
from flow_rl.rewards.background import AsyncReward
from flow_rl.rewards.base import SCORE_MAX, SCORE_MIN, Reward, Samples
from flow_rl.stop_signal import wait_for


@dataclass(frozen=True, kw_only=True)
class Part:
    """One reward of a composite."""

    reward: Reward
    """The scorer."""
    weight: float
    """Its share of the composite."""
    low: float = SCORE_MIN
    """The score that counts as 1: scores from `low` to `high` are stretched to the scale, those beyond clipped."""
    high: float = SCORE_MAX
    """The score that counts as 5."""

    def scaled(self, scores: Tensor) -> Tensor:
        """Raw scores (N,), stretched from [low, high] to [1, 5]; NaN stays."""
        share = (scores - self.low) / (self.high - self.low)
        return SCORE_MIN + (SCORE_MAX - SCORE_MIN) * share.clamp(0, 1)


def weighted_mean(scores: Tensor, weights: Tensor) -> Tensor:
    """Mean of scores (N, K) that are not NaN under weights (K,) or (N, K), renormalised; NaN where none weighs."""
    present = weights * ~scores.isnan()
    # 0/0, where nothing is left, is the NaN that it should be
    return (present * scores.nan_to_num()).sum(1) / present.sum(1)


class CompositeReward(Reward):
    """Weighted mean of named rewards: `sum_k w_k R_k / sum_k w_k` over those that scored the sample.

    A part that masked a sample (NaN) leaves the others' weights renormalised; where every part did, or all that did not
    weigh nothing, the composite is NaN.

    Args:
        components: parts by name.

    Raises:
        ValueError: no part, a negative weight, weights that do not sum to 1, or an empty scale.
    """

    def __init__(self, components: dict[str, Part]) -> None:
        if not components:
            raise ValueError("components is empty: name at least one part, with its reward and weight.")
        weights = {name: part.weight for name, part in components.items()}
        # `not >=` also refuses NaN
        if not min(weights.values()) >= 0 or not abs(sum(weights.values()) - 1) <= 1e-4:
            raise ValueError(
                f"The weights of components must be non-negative and sum to 1; received {weights}, which sum to "
                f"{sum(weights.values()):g}."
            )
        for name, part in components.items():
            if not SCORE_MIN <= part.low < part.high <= SCORE_MAX:
                raise ValueError(
                    f"components.{name}: low and high must lie on the scale {SCORE_MIN:g} to {SCORE_MAX:g}, low below "
                    f"high; received {part.low:g} and {part.high:g}."
                )
        self.components = components

    @override
    def score(self, samples: Samples) -> Tensor:
        """Score a batch by the weighted mean of the parts."""
        return self.combine(self.parts(samples))

    def parts(self, samples: Samples) -> dict[str, Tensor]:
        """Every part's own scores, on its own scale, float32 (N,), NaN where masked.

        Remote parts are asked all at once, and score while those of this process do.
        """
        pending = {
            name: submit(part.reward, samples, _setting(name), section=None)
            for name, part in self.components.items()
            if isinstance(part.reward, AsyncReward)
        }
        try:
            own = {
                name: ask(part.reward, samples, _setting(name), section=None)
                for name, part in self.components.items()
                if name not in pending
            }
            scores = own | {name: wait_for(future) for name, future in pending.items()}
        finally:
            for future in pending.values():
                future.cancel()
        return {name: scores[name] for name in self.components}

    def combine(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The composite of what `parts` returned, float32 (N,), so that logs and score cost one scoring."""
        scores = torch.stack([part.scaled(parts[name]) for name, part in self.components.items()], dim=1)
        return weighted_mean(scores, torch.tensor([part.weight for part in self.components.values()]))

    @override
    def statistics(self) -> dict[str, float]:
        """Every part's statistics, as `part/name`."""
        return {
            f"{name}/{key}": value
            for name, part in self.components.items()
            for key, value in part.reward.statistics().items()
        }


def _setting(name: str) -> str:
    return f"init_args.components.{name}.reward"
