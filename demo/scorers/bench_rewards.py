"""What the demo's bench asks of text-to-image, beside the quality score: one facet a reward, for evaluation only.

`docs/evaluation.md` has the definitions in one table, with what each cannot see.

Shapes: N images, C = 3, H = W = 32, R reference renders, D features.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations

import torch
from torch import Tensor
from typing_extensions import override

from demo.scorers.exact import flat_color
from demo.scorers.sets import load_quality, load_verifier
from demo.scorers.verifiers import Verdict, credit
from demo.world.dataset import render_scenes
from demo.world.vocabulary import ATTRIBUTES, CATEGORIES
from flow_rl.models.images import from_uint8
from flow_rl.rewards.base import SCORE_MAX, SCORE_MIN, Reward, Samples
from flow_rl.rewards.pixels import finite_images

#: facet of alignment -> the attributes that belong to it; the recipe's order: objects, attributes, relations
FACETS: dict[str, frozenset[str]] = {
    "objects": frozenset({"kind", "glasses", "beard", "top", "eyes", "orb"}),
    "shape": frozenset({"hair", "pot_shape", "shape"}),
    "colour": frozenset({"background", "hair_color", "shirt", "pot", "bloom", "body", "sky", "hills", "card", "ink"}),
    "position": frozenset({"position"}),
    "text": frozenset({"text"}),
}
_REFERENCES, _REFERENCE_SEED, _NEIGHBOUR = 300, 777, 3
_SAME, _EDGE = 0.05, 0.3  # RGB distances of neighbours: up to the first one colour, from the second on a clear edge


class Reader:
    """The judge's reading of the batch at hand, shared by all facets: the networks look at each image once."""

    def __init__(self) -> None:
        self.verifier = load_verifier("judge")
        self._samples: Samples | None = None
        self._read: tuple[Verdict, list[dict[str, str]], Tensor] | None = None

    def read(self, samples: Samples) -> tuple[Verdict, list[dict[str, str]], Tensor]:
        """Compare with the prompts, and read everything that the categories can show.

        Returns:
            the verdict, all attributes of every image, and bool (N,), False for an image that is not finite.
        """
        if samples is not self._samples:
            images, finite = finite_images(samples.images)
            verdict = self.verifier.check(images, samples.prompts)
            self._read = verdict, self.verifier.predict(images, samples.categories), finite
            self._samples = samples
        return self._read


@cache
def shared_reader() -> Reader:
    """The process's one reader."""
    return Reader()


class FacetReward(Reward):
    """Share of the requested attributes of one facet that an image shows, as the judge reads it.

    Args:
        facet: one of `FACETS`.
    """

    def __init__(self, facet: str) -> None:
        if facet not in FACETS:
            raise ValueError(f"Unknown facet {facet!r}, expected one of {list(FACETS)}.")
        self.attributes = FACETS[facet]

    @override
    def score(self, samples: Samples) -> Tensor:
        """Score a batch; NaN where the prompt asks for nothing of this facet, or the image is not finite."""
        verdict, _, finite = shared_reader().read(samples)
        scores = torch.full((len(samples),), torch.nan)
        for i, (asked, shown) in enumerate(zip(verdict.requested, verdict.predicted, strict=True)):
            credits = [credit(name, value, shown[name]) for name, value in asked.items() if name in self.attributes]
            if credits and finite[i]:
                scores[i] = _to_scale(sum(credits) / len(credits))
        return scores


class FidelityReward(Reward):
    """Whether an image could be a true render: improved precision (Kynkäänniemi et al., 2019, arXiv 1904.06991).

    5 where the image's features lie within the third-nearest-neighbour radius of some true render of its category,
    1 where they lie outside of all: the mean over images is the metric. The features are those of the judge's quality
    network, scaled by their spread over the renders.

    Args:
        cache_dir: keeps the renders.
    """

    def __init__(self, cache_dir: str = "runs/cache") -> None:
        self.network = load_quality("judge")
        self.cache_dir = cache_dir

    @override
    @torch.no_grad()
    def score(self, samples: Samples) -> Tensor:
        """Score a batch; NaN where the category has no renders or the image is not finite."""
        images, finite = finite_images(samples.images)
        scores = torch.full((len(samples),), torch.nan)
        for category in set(samples.categories) & set(CATEGORIES):
            rows = torch.tensor([i for i, c in enumerate(samples.categories) if c == category and finite[i]])
            if len(rows):
                scores[rows] = _to_scale(self._inside(images[rows], category).float())
        return scores

    def _inside(self, images: Tensor, category: str) -> Tensor:
        """Bool (N,): within the radius of some reference."""
        references_RD, radii_R, spread_D = self._references(category)
        distances_NR = torch.cdist(self._features(images) / spread_D, references_RD)
        return (distances_NR <= radii_R).any(dim=1)

    @cache  # noqa: B019 (one object a process)
    def _references(self, category: str) -> tuple[Tensor, Tensor, Tensor]:
        renders = render_scenes(
            _REFERENCE_SEED, range(_REFERENCES), "test", category=category, cache_dir=self.cache_dir
        )
        features_RD = self._features(from_uint8(renders.images))
        spread_D = features_RD.std(dim=0).clamp(min=1e-3)
        features_RD = features_RD / spread_D
        radii_R = torch.cdist(features_RD, features_RD).kthvalue(_NEIGHBOUR + 1, dim=1).values  # the nearest is itself
        return features_RD, radii_R, spread_D

    def _features(self, images: Tensor) -> Tensor:
        return self.network.features(images)


class EdgeReward(Reward):
    """How clean the drawing is, whatever the prompt: the art is flat colours with sharp edges.

    Share of the pairs of neighbouring pixels that have one colour (RGB distance below 0.05) or a clear edge between
    them (above 0.3), and are neither smeared nor smudged.
    """

    @override
    def score(self, samples: Samples) -> Tensor:
        """Score a batch; NaN where the image is not finite."""
        images, finite = finite_images(samples.images)
        steps = [images.diff(dim=dim).square().sum(dim=1).sqrt().flatten(1) for dim in (2, 3)]
        step = torch.cat(steps, dim=1)
        share = ((step < _SAME) | (step > _EDGE)).float().mean(dim=1)
        return torch.where(finite, _to_scale(share), torch.nan)


class PaletteReward(Reward):
    """Whether the ground's colour is one of the style's, asked for or not.

    It is `demo.scorers.exact`'s check, which the annotator's verdicts rest on as well. No reward asks for it: an image
    with a colour that nobody asked for is right by this facet.
    """

    @override
    def score(self, samples: Samples) -> Tensor:
        """Score a batch; NaN where the category has no palette or the image is not finite."""
        images, finite = finite_images(samples.images)
        scores = torch.full((len(samples),), torch.nan)
        for category in set(samples.categories) & set(CATEGORIES):
            rows = torch.tensor([i for i, c in enumerate(samples.categories) if c == category and finite[i]])
            if len(rows):
                scores[rows] = _to_scale(flat_color(images[rows], category).sum(dim=1).clamp(0, 1))
        return scores


class VarietyReward(Reward):
    """Creativity: are the images of one prompt right, and yet different in what the prompt leaves open.

    For every pair of a prompt's images: the share of the attributes left open in which they differ, times the share of
    the requested attributes that the one shows, times that of the other. The mean over pairs is divided by what two
    independent true scenes would reach (attributes differ with probability 1 - 1/V for V values), so 5 is the world's
    own variety. A score of the group: every image of a prompt carries it, and a batch must hold all of them, as `test`
    makes them.
    """

    @override
    def score(self, samples: Samples) -> Tensor:
        """Score a batch; NaN where a prompt has one image, leaves nothing open, or is not understood."""
        verdict, shown, finite = shared_reader().read(samples)
        scores = torch.full((len(samples),), torch.nan)
        groups: dict[str, list[int]] = {}
        for i, prompt in enumerate(samples.prompts):
            if finite[i] and not verdict.accuracy[i].isnan():
                groups.setdefault(prompt, []).append(i)
        for rows in groups.values():
            category = samples.categories[rows[0]]
            asked = verdict.requested[rows[0]]
            values = {a.name: len(a.values) for a in ATTRIBUTES[category] if a.name not in asked and a.values}
            if len(rows) > 1 and values:
                accuracy = verdict.accuracy[rows].tolist()
                pairs = [
                    accuracy[a] * accuracy[b] * _difference(shown[rows[a]], shown[rows[b]], values)
                    for a, b in combinations(range(len(rows)), 2)
                ]
                scores[rows] = _to_scale(min(sum(pairs) / len(pairs), 1.0))
        return scores


def _difference(one: dict[str, str], other: dict[str, str], values: dict[str, int]) -> float:
    """Share of the open attributes that differ, relative to two independent draws of `values` values each."""
    expected = sum(1 - 1 / count for count in values.values())
    return sum(one[name] != other[name] for name in values) / expected


def _to_scale(share: Tensor | float) -> Tensor | float:
    """[0, 1] to the scale of rewards."""
    return SCORE_MIN + (SCORE_MAX - SCORE_MIN) * share
