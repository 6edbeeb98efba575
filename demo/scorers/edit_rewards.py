"""The demo world's rewards for edits: was the instruction followed, and did everything else stay.

Shapes: N samples, H = W = 32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from demo.scorers.rewards import Measure, check_measure, to_scale
from demo.scorers.sets import load_verifier
from demo.scorers.weights import VerifierName
from demo.world.edits import EDITABLE, parse_instruction
from flow_rl.rewards.base import Reward, Samples
from flow_rl.rewards.pixels import finite_images

#: the largest share of the pixels that an edit of an attribute changes in the renders, and a little more
TOUCHED = {
    ("plant", "background"): 0.85,
    ("plant", "bloom"): 0.1,
    ("plant", "pot"): 0.22,
    ("portrait", "background"): 0.55,
    ("portrait", "beard"): 0.15,
    ("portrait", "glasses"): 0.12,
    ("portrait", "hair"): 0.5,
    ("portrait", "hair_color"): 0.55,
    ("portrait", "shirt"): 0.15,
}
#: RGB distance at which a pixel is as good as another colour; decoding alone moves it by some hundredths
_SAME_COLOR = 0.2


class EditSuccessReward(Reward):
    """Whether the attribute that the instruction names shows the value asked for, mapped to 1..5.

    Args:
        verifier: whose eyes: ``"annotator"`` for training, ``"judge"`` for evaluation only.
        measure: ``"probability"`` is how sure the verifier is of the value (smooth); ``"accuracy"`` whether it is the
            one that it reads.
    """

    def __init__(self, verifier: VerifierName = "annotator", measure: Measure = "probability") -> None:
        self.measure = check_measure(measure)
        self.verifier = load_verifier(verifier)

    def score(self, samples: Samples) -> Tensor:
        """Score a batch; NaN where there is no instruction of the demo world's, or the image is not finite."""
        images, finite = finite_images(samples.images)
        scores = torch.full((len(samples),), torch.nan)
        asked = understood(samples)
        if asked:
            rows, categories = list(asked), [samples.categories[i] for i in asked]
            if self.measure == "probability":
                wanted = [{name: value} for name, value in asked.values()]
                found = self.verifier.probabilities(images[rows], categories, wanted)
                shares = [next(iter(reading.values())) for reading in found]
            else:
                shown = self.verifier.predict(images[rows], categories)
                shares = [float(s[name] == value) for s, (name, value) in zip(shown, asked.values(), strict=True)]
            scores[rows] = to_scale(torch.tensor(shares))
        return torch.where(finite.cpu(), scores, torch.nan)


class EditConsistencyReward(Reward):
    """Whether what the instruction does not name stayed as it is in the source, mapped to 1..5.

    The mean of two shares: how sure the verifier is of the source's other attributes in the image, and how many pixels
    kept their colour. Which pixels an edit may change is not known here, only how many: the most changed ones, as many
    as the attribute takes at most, do not count.

    Args:
        verifier: whose eyes: ``"annotator"`` for training, ``"judge"`` for evaluation only.
    """

    def __init__(self, verifier: VerifierName = "annotator") -> None:
        self.verifier = load_verifier(verifier)

    def score(self, samples: Samples) -> Tensor:
        """Score a batch; NaN where there is no source or instruction to compare with, or the image is not finite."""
        images, finite = finite_images(samples.images)
        scores = torch.full((len(samples),), torch.nan)
        asked = understood(samples)
        if asked:
            rows, categories = list(asked), [samples.categories[i] for i in asked]
            sources = samples.sources[rows]
            before = self.verifier.predict(sources, categories)
            others = [
                {other: value for other, value in shown.items() if other != name}
                for shown, (name, _) in zip(before, asked.values(), strict=True)
            ]
            kept = self.verifier.probabilities(images[rows], categories, others)
            attributes = torch.tensor([sum(found.values()) / len(found) for found in kept])
            touched = [TOUCHED[category, name] for category, (name, _) in zip(categories, asked.values(), strict=True)]
            scores[rows] = to_scale((attributes + unchanged(images[rows], sources, touched)) / 2)
        return torch.where(finite.cpu(), scores, torch.nan)


def understood(samples: Samples) -> dict[int, tuple[str, str]]:
    """Rows whose instruction can be understood and followed, with the attribute and the value it asks for."""
    asked: dict[int, tuple[str, str]] = {}
    if samples.sources is None:
        return asked
    for row, (text, category) in enumerate(zip(samples.prompts, samples.categories, strict=True)):
        try:
            name, value = parse_instruction(text)
        except ValueError:
            continue
        if name in EDITABLE.get(category, ()):
            asked[row] = name, value
    return asked


def unchanged(images: Tensor, sources: Tensor, touched: list[float]) -> Tensor:
    """How many pixels kept their colour, smoothly, in [0, 1], shape (N,).

    Args:
        images: float32 in [0, 1], shape (N, 3, H, W).
        sources: the same before the edit.
        touched: share of the pixels that do not count, those that changed most, one an image.
    """
    squared = (images.cpu() - sources.cpu()).square().sum(1).flatten(1)
    same = (-squared / (2 * _SAME_COLOR**2)).exp().sort(dim=1, descending=True).values
    counted = [max(1, round(same.shape[1] * (1 - share))) for share in touched]
    return torch.stack([row[:count].mean() for row, count in zip(same, counted, strict=True)])
