"""A step's images in parts of similar length, so that short questions are not padded to the longest.

The loss and its gradient are those of the whole batch: a weighted mean over the parts.

Shapes: N images or pairs of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from datamodules.annotation_files import AnnotationBatch
from datamodules.preferences import PreferenceBatch
from rewards.conversation import Question

#: characters that make a token, and pixels on a side of what makes an image token: about, which is enough for sorting
_CHARACTERS, _SIDE = 4, 28


def rough_length(question: Question, reasoning: str) -> float:
    """About how many tokens a question and its reasoning have. It decides how much padding there is, nothing else."""
    text = len(question.rubric.system_text) + len(question.prompt) + len(reasoning)
    pixels = sum(image.shape[-2] * image.shape[-1] for image in question.images)
    return text / _CHARACTERS + pixels / _SIDE**2


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
    batch: AnnotationBatch | PreferenceBatch, questions: Sequence[Question], direct: Sequence[bool], parts: int
) -> list[tuple[AnnotationBatch | PreferenceBatch, list[bool]]]:
    """A batch in parts.

    Args:
        batch: N scored images, or pairs, of which either image tells the length.
        questions: what is asked about them, or about the better ones, N.
        direct: whether each answer is the score alone, N.
        parts: how many, in [1, N].

    Returns:
        batch and `direct` of each part.
    """
    examples = batch.examples if isinstance(batch, AnnotationBatch) else batch.chosen
    reasoning = ["" if skip else e.annotation.reasoning for e, skip in zip(examples, direct, strict=True)]
    lengths = [rough_length(*both) for both in zip(questions, reasoning, strict=True)]
    return [(batch.take(rows), [direct[i] for i in rows]) for rows in split_by_length(lengths, parts)]


def mean_of_parts(
    losses: Sequence[tuple[Tensor, dict[str, Tensor]]], sizes: Sequence[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The batch's (loss, metrics) from those of its parts, each a mean over as many images or pairs as `sizes`."""
    shares = [size / sum(sizes) for size in sizes]
    loss = sum(share * part for share, (part, _) in zip(shares, losses, strict=True))
    names = losses[0][1]
    metrics = {name: sum(w * found[name] for w, (_, found) in zip(shares, losses, strict=True)) for name in names}
    return loss, metrics


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
