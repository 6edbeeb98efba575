"""From the scores of an iteration, which arrive rollout by rollout, to advantages.

Shapes: N samples of a rollout, K rewards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor

from flow_rl.distributed.gradients import over_ranks
from flow_rl.distributed.shares import gather_ranks
from flow_rl.flow.advantages import group_advantages, rows_with_signal
from flow_rl.rl.objectives import Rollout
from flow_rl.rl.reward_weights import GroupFilter, WeightSource
from flow_rl.rl.settings import AdvantageSettings


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A rollout's scores and what followed from them.

    Attributes:
        scores: raw, NaN where masked, float32 (N, K).
        weights: before masks, float32 (N, K).
        groups: int64 (N,).
        advantages: float32 (N,).
        teaches: bool (N,). False for a sample without any score, in a group whose scores are all alike, or in a group
            that a filter refuses. `advantages` cannot say it: a sample in the middle of its group has advantage 0, and
            counts.
    """

    scores: Tensor
    weights: Tensor
    groups: Tensor
    advantages: Tensor
    teaches: Tensor


def share_that_teaches(outcomes: Iterable[Outcome]) -> float:
    """Share of all ranks' samples that teach, the same on every rank. Every rank must ask."""
    teaches = torch.cat([outcome.teaches for outcome in outcomes])
    counts = over_ranks({"teaching": float(teaches.sum()), "samples": float(len(teaches))})
    return counts["teaching"] / counts["samples"]


class AdvantageEstimator:
    """Turns the scores of rollouts into advantages, each as soon as it can.

    A group is whole within its rollout, so a rollout needs its own scores alone, unless something looks beyond a group:
    a filter, or the normalisation over the batch. Then all scores are waited for, and gathered from all ranks.

    Args:
        settings: how several rewards become one advantage.
        clip: advantages are clipped to plus and minus this.
        reward_names: K names.
        weight_source: the rewards' weights.
        filters: refuse groups.
    """

    def __init__(
        self,
        settings: AdvantageSettings,
        *,
        clip: float,
        reward_names: Sequence[str],
        weight_source: WeightSource,
        filters: Sequence[GroupFilter],
    ) -> None:
        self.settings, self.clip = settings, clip
        self.reward_names, self.weight_source = tuple(reward_names), weight_source
        self.filters = filters

    @property
    def looks_beyond_groups(self) -> bool:
        """Whether no advantage can be had before all scores of all ranks are there."""
        return self.settings.batch_normalise or bool(self.filters)

    def estimate(self, scored: Iterable[tuple[Rollout, Tensor]]) -> Iterator[tuple[Rollout, Outcome]]:
        """Advantages of every rollout, in the given order whichever scores are there first: sums depend on the order.

        Args:
            scored: rollouts with their raw scores (N, K), such as a `ScoreQueue`.
        """
        if not self.looks_beyond_groups:
            for rollout, scores in scored:
                yield rollout, self._outcome([rollout], scores)
            return
        drained = list(scored)
        rollouts = [rollout for rollout, _ in drained]
        whole = self._outcome(rollouts, torch.cat([scores for _, scores in drained]))
        sizes = [len(rollout) for rollout in rollouts]
        columns = {field.name: getattr(whole, field.name).split(sizes) for field in fields(Outcome)}
        for n, rollout in enumerate(rollouts):
            yield rollout, Outcome(**{name: parts[n] for name, parts in columns.items()})

    def _outcome(self, rollouts: Sequence[Rollout], scores: Tensor) -> Outcome:
        """Advantages of the groups in some rollouts, whose scores are joined."""
        weights = torch.cat([self.weight_source.weights(r.categories, r.tasks, self.reward_names) for r in rollouts])
        groups = torch.cat([rollout.groups for rollout in rollouts])
        own = slice(None)
        everyone = scores, weights, groups
        if self.looks_beyond_groups:
            everyone = gather_ranks(scores), gather_ranks(weights), gather_ranks(groups)
            rank = dist.get_rank() if dist.is_initialized() else 0
            own = slice(rank * len(scores), (rank + 1) * len(scores))
        advantages = group_advantages(
            everyone[0],
            everyone[2],
            everyone[1],
            std_floor=self.settings.std_floor,
            clip=self.clip,
            mode=self.settings.mode,
            batch_normalise=self.settings.batch_normalise,
        )
        teaches = rows_with_signal(everyone[0], everyone[2], everyone[1], mode=self.settings.mode)
        for group_filter in self.filters:
            kept = group_filter.keep(*everyone)
            advantages, teaches = advantages.where(kept, 0.0), teaches & kept
        return Outcome(scores=scores, weights=weights, groups=groups, advantages=advantages[own], teaches=teaches[own])
