"""From the scores of an iteration, which arrive piece by piece, to advantages.

Shapes: N samples of a piece, K rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from flow_rl.batches import Prompts
from flow_rl.distributed.shares import gather_ranks
from flow_rl.flow.advantages import group_advantages
from flow_rl.rl.reward_weights import GroupGate, WeightSource
from flow_rl.rl.settings import ObjectiveSettings


@dataclass(frozen=True, kw_only=True)
class AdvantageSettings:
    """How several rewards become one advantage."""

    mode: Literal["per_reward", "sum"] = "per_reward"
    """per_reward: each reward is normalised in its group, then they are summed (the paper's Eq. 13); sum: the weighted
    sum is normalised, the baseline of the comparison."""
    batch_normalise: bool = False
    """Standardise the advantages once more over the whole iteration, as GDPO's code does. No gradient is computed then
    before every score of the iteration is there."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Samples of one piece with what is known of them before they are scored.

    Attributes:
        prompts: on the host, P of them.
        members: images a prompt, side by side; N is P times as many.
        scores: waits for the raw scores (N, K).
    """

    prompts: Prompts
    members: int
    scores: Callable[[], Tensor]

    def __len__(self) -> int:
        return len(self.prompts) * self.members

    @property
    def groups(self) -> Tensor:
        """Group of each sample, int64 (N,)."""
        return self.prompts.groups.repeat_interleave(self.members)

    @property
    def categories(self) -> tuple[str, ...]:
        """Category of each sample, length N."""
        return tuple(category for category in self.prompts.categories for _ in range(self.members))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task of each sample, length N."""
        return (self.prompts.task,) * len(self)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A piece's scores and what followed from them.

    Attributes:
        scores: raw, NaN where masked, float32 (N, K).
        weights: before masks, float32 (N, K).
        groups: int64 (N,).
        advantages: float32 (N,).
    """

    scores: Tensor
    weights: Tensor
    groups: Tensor
    advantages: Tensor


class Advantages:
    """Turns pieces into outcomes, each as soon as it can.

    A group is whole within its piece, so a piece needs its own scores alone, unless something looks beyond a group:
    a gate, or the normalisation over the batch. Then all scores are waited for, and gathered from all ranks.

    Args:
        settings: of the composite.
        objective: has the floor of the deviation and the clip.
        reward_names: K names.
        weight_source: the rewards' weights.
        gates: refuse groups.
    """

    def __init__(
        self,
        settings: AdvantageSettings,
        objective: ObjectiveSettings,
        *,
        reward_names: Sequence[str],
        weight_source: WeightSource,
        gates: Sequence[GroupGate],
    ) -> None:
        self.settings, self.objective = settings, objective
        self.reward_names, self.weight_source = tuple(reward_names), weight_source
        self.gates = gates

    def in_turn(self, pieces: Sequence[Scored]) -> Iterator[Outcome]:
        """The outcomes of `pieces`, in their order whichever scores are there first: sums must not depend on it."""
        if not self.settings.batch_normalise and not self.gates:
            for piece in pieces:
                yield self._outcome([piece])
            return
        whole = self._outcome(pieces)
        sizes = [len(piece) for piece in pieces]
        columns = [getattr(whole, name).split(sizes) for name in ("scores", "weights", "groups", "advantages")]
        for scores, weights, groups, advantages in zip(*columns, strict=True):
            yield Outcome(scores=scores, weights=weights, groups=groups, advantages=advantages)

    def _outcome(self, pieces: Sequence[Scored]) -> Outcome:
        """Scores of some pieces joined, and the advantages of the groups in them."""
        scores = torch.cat([piece.scores() for piece in pieces])
        weights = torch.cat(
            [self.weight_source.weights(piece.categories, piece.tasks, self.reward_names) for piece in pieces]
        )
        groups = torch.cat([piece.groups for piece in pieces])
        own = slice(None)
        everyone = scores, weights, groups
        if self.settings.batch_normalise or self.gates:
            everyone = tuple(gather_ranks(values) for values in everyone)
            rank = dist.get_rank() if dist.is_initialized() else 0
            own = slice(rank * len(scores), (rank + 1) * len(scores))
        advantages = group_advantages(
            everyone[0],
            everyone[2],
            everyone[1],
            std_floor=self.objective.std_floor,
            clip=self.objective.advantage_clip,
            mode=self.settings.mode,
            batch_normalise=self.settings.batch_normalise,
        )
        for gate in self.gates:
            advantages = advantages.where(gate.keep(*everyone), 0.0)
        return Outcome(scores=scores, weights=weights, groups=groups, advantages=advantages[own])
