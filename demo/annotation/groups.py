"""Groups of annotated images, and how edits and damaged images become one.

Shapes: G members of a group, C = 3, H = W = 32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from demo.annotation.damage import FACE, GRADES, PICTURE, damage
from demo.annotation.judgements import Judgement, judge_damage, judge_edit
from demo.world.edits import EditPair
from demo.world.looks import look_of
from demo.world.world import render
from flow_rl.models.images import from_uint8


@dataclass(frozen=True, kw_only=True)
class Group:
    """Images that compete with each other, with their annotations.

    Attributes:
        name: unique in its file; begins with the dimension.
        dimension: what was judged.
        prompt: of all members; an instruction for edits.
        images: float32 in [0, 1], shape (G, 3, H, W).
        judgements: one an image.
        source: for edits, (3, H, W).
    """

    name: str
    dimension: str
    prompt: str
    images: Tensor
    judgements: tuple[Judgement, ...]
    source: Tensor | None = None


def render_tensor(*scenes: Any) -> Tensor:
    """Renders as float32 in [0, 1], shape (N, 3, H, W)."""
    return from_uint8(np.stack([render(scene) for scene in scenes]))


def edit_group(
    index: int,
    pair: EditPair,
    images: Tensor,
    shown: Sequence[Mapping[str, str]],
    looks: Sequence[str],
    broken: Sequence[Sequence[str]],
    *,
    source: Tensor,
    certainties: Sequence[Mapping[str, float] | None] | None = None,
) -> Group:
    """Results of one edit, judged against its instruction and its source.

    Args:
        index: of the group.
        pair: the edit.
        images: its results, (G, 3, H, W).
        shown: attributes of each result.
        looks: look of each result, see `demo.world.looks`.
        broken: what else is wrong with each, see `judge_edit`.
        source: (3, H, W).
        certainties: of each, see `judge_edit`; None where all attributes are known.
    """
    return Group(
        name=f"instruction_following-{index}",
        dimension="instruction_following",
        prompt=pair.instruction,
        images=images,
        judgements=tuple(
            judge_edit(
                pair.attribute,
                pair.value,
                pair.source.attributes,
                after,
                category=pair.category,
                looks=(look_of(pair.source), look),
                broken=flaws,
                certainty=certainty,
            )
            for after, look, flaws, certainty in zip(
                shown, looks, broken, certainties or [None] * len(images), strict=True
            )
        ),
        source=source,
    )


def damaged_group(
    dimension: str,
    name: str,
    prompt: str,
    images: Tensor,
    grades: Sequence[float],
    rng: np.random.Generator,
    *,
    keep: float = 0.0,
) -> Group:
    """Damage images further by known grades.

    Args:
        dimension: `portrait` or `aesthetic`: which kinds of damage.
        name: of the group.
        prompt: of the images.
        images: (G, 3, H, W).
        grades: how damaged each is to begin with, 0 to 4; with half a grade or more the reasoning says so.
        rng: draws kinds and grades.
        keep: share of the images to leave as they are.
    """
    members = len(images)
    drawn = np.concatenate([rng.permutation(GRADES + 1) for _ in range(1 + members // (GRADES + 1))])[:members]
    made, judgements = [], []
    for image, before, added in zip(images, grades, drawn.tolist(), strict=True):
        added = 0 if rng.random() < keep else min(added, int(GRADES - before))
        image, kinds = damage(image, FACE if dimension == "portrait" else PICTURE, added, rng)
        kinds = (["mixed"] if before >= 0.5 else []) + kinds  # what the base spoilt by itself has no name
        made.append(image)
        judgements.append(judge_damage(kinds, before + added))
    return Group(name=name, dimension=dimension, prompt=prompt, images=torch.stack(made), judgements=tuple(judgements))
