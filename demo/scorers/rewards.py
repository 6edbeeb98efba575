"""The demo world's rewards: is what was asked for there, and is the picture sound.

Shapes: N samples.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from demo.scorers.sets import load_quality, load_verifier
from demo.scorers.weights import VerifierName
from flow_rl.rewards.base import SCORE_MAX, SCORE_MIN, Reward, Samples
from flow_rl.rewards.pixels import finite_images

Measure = Literal["probability", "accuracy"]


class AttributeReward(Reward):
    """Share of the requested attributes that an image shows, mapped to 1..5.

    Args:
        verifier: whose eyes: ``"annotator"`` for training, ``"judge"`` for evaluation only,
            ``"monitor"`` for watching training.
        measure: ``"probability"`` averages how sure the verifier is of each requested value (smooth);
            ``"accuracy"`` counts the values that it reads as requested.
    """

    def __init__(self, verifier: VerifierName = "annotator", measure: Measure = "probability") -> None:
        self.measure = check_measure(measure)
        self.verifier = load_verifier(verifier)

    def score(self, samples: Samples) -> Tensor:
        """Score a batch; NaN where the prompt is none of the demo world's, or the image is not finite."""
        images, finite = finite_images(samples.images)
        share = getattr(self.verifier.check(images, samples.prompts), self.measure)
        return torch.where(finite, to_scale(share), torch.nan)


class QualityReward(Reward):
    """Soundness of the picture, 1..5, whatever the prompt.

    Args:
        verifier: whose eyes: ``"annotator"`` for training, ``"judge"`` for evaluation only,
            ``"monitor"`` for watching training.
    """

    def __init__(self, verifier: VerifierName = "annotator") -> None:
        self.quality = load_quality(verifier)

    @torch.no_grad()
    def score(self, samples: Samples) -> Tensor:
        """Score a batch; NaN where the image is not finite."""
        images, finite = finite_images(samples.images)
        return torch.where(finite, self.quality(images), torch.nan)


def check_measure(measure: str) -> Measure:
    """Return ``measure``, or raise ValueError where it is none."""
    if measure not in get_args(Measure):
        raise ValueError(f"Unknown measure {measure!r}, expected one of {list(get_args(Measure))}.")
    return measure


def to_scale(share: Tensor) -> Tensor:
    """[0, 1] to the scale of rewards."""
    return SCORE_MIN + (SCORE_MAX - SCORE_MIN) * share
