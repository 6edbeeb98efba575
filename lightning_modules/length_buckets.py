"""A step's images in parts of similar length, so that short questions are not padded to the longest.

The loss and its gradient are those of the whole batch: a weighted mean over the parts.

Shapes: N images or pairs of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from datamodules.annotation_files import AnnotationBatch, LoadedAnnotation
from datamodules.preferences import PreferenceBatch
from flow_rl.rewards.rubrics import Rubric
from flow_rl.rl.reward_metrics import combined

#: characters that make a token, and pixels on a side of what makes an image token: about, which is enough for sorting
_CHARACTERS, _SIDE = 4, 28


def rough_length(example: LoadedAnnotation, rubric: Rubric, direct: bool) -> float:
    """About how many tokens a question and its answer have. It decides how much padding there is, nothing else.

    Args:
        example: the image in question.
        rubric: of its dimension.
        direct: whether the answer is the score alone.
    """
    known = example.annotation
    text = len(rubric.system_text) + len(known.prompt) + (0 if direct else len(known.reasoning))
    images = [example.image] if example.source is None else [example.source, example.image]
    return text / _CHARACTERS + sum(image.shape[-2] * image.shape[-1] for image in images) / _SIDE**2


def split_by_length(lengths: Sequence[float], parts: int) -> list[list[int]]:
    """Places in a batch, shortest first, in parts whose sizes differ by at most one.

    Args:
        lengths: of each place, N of them.
        parts: how many, in [1, N].
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    bounds = [len(order) * part // parts for part in range(parts + 1)]
    return [order[low:high] for low, high in pairwise(bounds)]


def parts_by_length(
    batch: AnnotationBatch | PreferenceBatch, rubrics: Mapping[str, Rubric], direct: Sequence[bool], parts: int
) -> list[tuple[AnnotationBatch | PreferenceBatch, list[bool]]]:
    """A batch in parts.

    Args:
        batch: N scored images, or pairs, of which either image tells the length.
        rubrics: by dimension.
        direct: whether each answer is the score alone, N.
        parts: how many, in [1, N].

    Returns:
        batch and `direct` of each part.
    """
    examples = batch.examples if isinstance(batch, AnnotationBatch) else batch.chosen
    lengths = [rough_length(e, rubrics[e.annotation.dimension], skip) for e, skip in zip(examples, direct, strict=True)]
    return [(batch.take(rows), [direct[i] for i in rows]) for rows in split_by_length(lengths, parts)]


def mean_of_parts(
    losses: Sequence[tuple[Tensor, dict[str, Tensor]]], sizes: Sequence[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The batch's (loss, metrics) from those of its parts, each a mean over as many images or pairs as `sizes`."""
    loss = sum(size / sum(sizes) * part for size, (part, _) in zip(sizes, losses, strict=True))
    return loss, combined([(size, metrics) for size, (_, metrics) in zip(sizes, losses, strict=True)])


def check_parts(data: Any, parts: int, world_size: int) -> None:
    """Refuse more parts than a rank has images, or pairs, in a forward.

    Args:
        data: an `AnnotationDataModule` or a `PreferenceDataModule`; anything else is not looked at.
        parts: model.length_parts.
        world_size: ranks.

    Raises:
        ValueError: with what to change.
    """
    size = getattr(data, "batch_size", None)
    if size is None:
        return
    pairs = hasattr(data, "source")
    most = size // world_size // (2 if pairs else 1)
    if parts > most:
        raise ValueError(
            f"model.length_parts is {parts}, but with data.batch_size {size} a rank has {most} "
            f"{'pairs' if pairs else 'images'} in a step: make it at most {most}."
        )
