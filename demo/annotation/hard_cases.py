"""Which images to annotate next: those that the reward model reads worst.

Shapes: G members of a group, C = 3, H = W = 32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from demo.annotation.groups import Group
from flow_rl.rewards.asking import ask
from flow_rl.rewards.base import Samples
from flow_rl.rewards.vlm import VLMReward


def hardest(groups: Iterable[Group], export: str, counts: Mapping[str, int]) -> Iterator[Group]:
    """The groups whose scores are furthest from the annotations, in the order in which they came.

    Args:
        groups: with annotations.
        export: of the reward model.
        counts: how many groups to keep of each dimension.
    """
    pool = list(groups)
    rewards = {dimension: VLMReward(export, dimension) for dimension in counts}
    error = [_error(rewards[group.dimension], group) for group in pool]
    kept: set[int] = set()
    for dimension, count in counts.items():
        rows = [row for row, group in enumerate(pool) if group.dimension == dimension]
        kept |= set(sorted(rows, key=lambda row: -error[row])[:count])
    yield from (pool[row] for row in sorted(kept))


def _error(reward: VLMReward, group: Group) -> float:
    """Mean distance of a group's scores from its annotations; an unreadable answer is as wrong as can be."""
    members = len(group.images)
    sources: Tensor | None = None if group.source is None else group.source.expand(members, -1, -1, -1)
    samples = Samples(
        images=group.images, prompts=[group.prompt] * members, categories=[group.dimension] * members, sources=sources
    )
    truth = group.images.new_tensor([judged.score for judged in group.judgements])
    return float((ask(reward, samples, group.dimension, section=None) - truth).abs().nan_to_num(nan=4.0).mean())
