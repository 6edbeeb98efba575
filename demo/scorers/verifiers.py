"""Verifiers: what an image shows, and whether that is what its prompt asked for.

There are three independent sets: the *annotator*, which rewards and reward data are made with, the *judge*, which only
evaluates, and the *monitor*, which watches training for reward hacking, so that the judge stays clean. Annotator and
monitor measure flat colours and letters exactly (``demo.scorers.exact``) and read everything else by small trained
heads; they differ in training images, initialisation and width. The judge shares nothing of this: another network,
trained in another way on other damage, reads all attributes, letters and flat colours included
(``demo.scorers.judge_reader``).

Shapes: N images, C = 3, H = W = 32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from demo.scorers.readings import Reading
from demo.world.captions import Request, parse
from demo.world.vocabulary import ATTRIBUTES
from demo.world.world import check_category


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How well images show what their prompts ask for.

    Attributes:
        accuracy: share of the requested attributes that the image shows, letters credited one by one; float32
            (N,); NaN where the prompt cannot be understood or asks for nothing that can be checked.
        probability: mean probability that the verifier gives to the requested values; float32 (N,); NaN as
            above.
        requested: for each image, requested attribute -> value.
        predicted: for each image, requested attribute -> the value it shows.
        probabilities: for each image, requested attribute -> probability of the requested value.
    """

    accuracy: Tensor
    probability: Tensor
    requested: list[dict[str, str]]
    predicted: list[dict[str, str]]
    probabilities: list[dict[str, float]]


class Verifier(nn.Module, ABC):
    """Reads the nameable attributes of images, given their category, and compares them with prompts."""

    @abstractmethod
    def read_category(self, images: Tensor, category: str) -> list[Reading]:
        """What images (N, 3, 32, 32) in [0, 1] of one category show: N readings of its attributes."""

    def predict(self, images: Tensor, categories: Sequence[str]) -> list[dict[str, str]]:
        """What images show: for each, every attribute of its category that it has.

        Args:
            images: float32 (N, 3, 32, 32) in [0, 1].
            categories: N categories.
        """
        readings = self._read(images, [check_category(category) for category in categories])
        return [
            {a.name: reading.value(a.name) for a in ATTRIBUTES[category]}
            for reading, category in zip(readings, categories, strict=True)
        ]

    def probabilities(
        self, images: Tensor, categories: Sequence[str], asked: Sequence[Mapping[str, str]]
    ) -> list[dict[str, float]]:
        """How sure it is of given values: for each image, attribute -> probability of the value asked for.

        Args:
            images: float32 (N, 3, 32, 32) in [0, 1].
            categories: N categories.
            asked: N mappings of attributes of the category to values.
        """
        readings = self._read(images, [check_category(category) for category in categories])
        return [
            {name: reading.probability(name, value) for name, value in wanted.items()}
            for reading, wanted in zip(readings, asked, strict=True)
        ]

    def check(self, images: Tensor, prompts: Sequence[str]) -> Verdict:
        """Compare images with what their prompts ask for.

        Args:
            images: float32 (N, 3, 32, 32) in [0, 1].
            prompts: N captions of the demo world.
        """
        if len(prompts) != len(images):
            raise ValueError(f"Expected one prompt an image, received {len(prompts)} for {len(images)} images.")
        requests = [_request(prompt) for prompt in prompts]
        known = [i for i, request in enumerate(requests) if request is not None]
        readings = self._read(images[known], [requests[i].category for i in known]) if known else []
        accuracy, probability = torch.full((2, len(prompts)), torch.nan)
        requested, predicted, probabilities = ([{} for _ in prompts] for _ in range(3))
        for i, reading in zip(known, readings, strict=True):
            requested[i] = requests[i].attributes
            predicted[i] = {name: reading.value(name) for name in requested[i]}
            probabilities[i] = {name: reading.probability(name, v) for name, v in requested[i].items()}
            credits = [credit(name, v, predicted[i][name]) for name, v in requested[i].items()]
            accuracy[i] = sum(credits) / len(credits)
            probability[i] = sum(probabilities[i].values()) / len(credits)
        return Verdict(
            accuracy=accuracy,
            probability=probability,
            requested=requested,
            predicted=predicted,
            probabilities=probabilities,
        )

    @torch.no_grad()
    def _read(self, images: Tensor, categories: Sequence[str]) -> list[Reading]:
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, 32, 32):
            raise ValueError(f"images must have shape (N, 3, 32, 32), received {tuple(images.shape)}.")
        if len(categories) != len(images):
            raise ValueError(f"Expected {len(images)} categories, received {len(categories)}.")
        images = images.to("cpu", torch.float32).clamp(0, 1)
        readings: list[Reading | None] = [None] * len(images)
        for category in dict.fromkeys(categories):
            rows = [i for i, c in enumerate(categories) if c == category]
            for row, reading in zip(rows, self.read_category(images[rows], category), strict=True):
                readings[row] = reading
        return readings  # type: ignore[return-value]


@lru_cache(maxsize=65536)
def _request(prompt: str) -> Request | None:
    """What a prompt asks for; None when it cannot be understood or asks for nothing."""
    try:
        request = parse(prompt)
    except ValueError:
        return None
    return request if request.attributes else None


def credit(name: str, requested: str, predicted: str) -> float:
    """Credit in [0, 1] for one requested attribute: letters count one by one, everything else is right or wrong."""
    if name != "text":
        return float(requested == predicted)
    right = sum(a == b for a, b in zip(requested, predicted, strict=False))
    return right / max(len(requested), len(predicted))
