"""Which images to annotate next: those that the reward model reads worst.

Shapes: G members of a group, C = 3, H = W = 32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from demo.annotation.groups import Group
from flow_rl.rewards.asking import ask
from flow_rl.rewards.base import SCORE_MAX, SCORE_MIN, Samples
from flow_rl.rewards.vlm import VLMReward


def hardest(groups: Iterable[Group], export: str, counts: Mapping[str, int]) -> Iterator[Group]:
    """The groups whose scores are furthest from the annotations, in the order in which they came.

    Args:
        groups: with annotations.
        export: of the reward model.
        counts: how many groups to keep of each dimension.
    """
    pool, kept = list(groups), set[int]()
    for dimension, count in counts.items():
        rows = [row for row, group in enumerate(pool) if group.dimension == dimension]
        if rows:
            errors = dict(zip(rows, _errors(VLMReward(export, dimension), [pool[row] for row in rows]), strict=True))
            kept |= set(sorted(rows, key=lambda row, errors=errors: -errors[row])[:count])
    yield from (pool[row] for row in sorted(kept))


def _errors(reward: VLMReward, groups: Sequence[Group]) -> list[float]:
    """Mean distance of each group's scores from its annotations; an unreadable answer is as wrong as can be.

    All groups are scored at once: a model is slow on a few images at a time.
    """
    sizes = [len(group.images) for group in groups]
    sources = None
    if groups[0].source is not None:
        sources = torch.cat([g.source.expand(n, -1, -1, -1) for g, n in zip(groups, sizes, strict=True)])
    samples = Samples(
        images=torch.cat([group.images for group in groups]),
        prompts=[group.prompt for group in groups for _ in group.images],
        categories=[group.dimension for group in groups for _ in group.images],
        sources=sources,
    )
    truths = torch.tensor([judged.score for group in groups for judged in group.judgements])
    distances = (
        (ask(reward, samples, groups[0].dimension, section=None) - truths).abs().nan_to_num(nan=SCORE_MAX - SCORE_MIN)
    )
    return [float(part.mean()) for part in distances.split(sizes)]
