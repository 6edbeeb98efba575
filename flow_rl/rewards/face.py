"""Face identity of edits: is the person in the output still the person of the source.

The paper (arXiv 2606.27608) scores it with an embedding model and discloses neither the model nor its rules; both
are this project's: the embedding is a plug-in, the rules are in ``FaceIdentityReward``.

Shapes: N samples, H height, W width, D embedding size, S faces in a source, F faces in an output.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from statistics import fmean

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from flow_rl.rewards.base import SCORE_MAX, SCORE_MIN, Reward, Samples
from flow_rl.rewards.pixels import finite_images

_NORM_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Face:
    """One face of an image.

    Attributes:
        box: left, top, right, bottom, in pixels of the image it was found in.
        embedding: float32 (D,), of norm 1; the cosine between two of them says how alike the faces are.
    """

    box: tuple[float, float, float, float]
    embedding: Tensor

    def __post_init__(self) -> None:
        norm = float(self.embedding.norm())
        if self.embedding.ndim != 1 or not abs(norm - 1) < _NORM_TOLERANCE:
            raise ValueError(
                f"A face's embedding must be one vector of norm 1, received shape {tuple(self.embedding.shape)} and "
                f"norm {norm:.4g}: divide it by its norm."
            )


@dataclass(frozen=True, kw_only=True)
class SimilarityAnchors:
    """The two similarities between which an embedder tells people apart: cosines in [-1, 1].

    Attributes:
        different: similarity of two different people; it and everything below scores 1.
        same: similarity of two pictures of one person; it and everything above scores 5.
    """

    different: float
    same: float

    def __post_init__(self) -> None:
        if not -1 <= self.different < self.same <= 1:
            raise ValueError(
                f"Anchors must be cosines with different < same, received different={self.different}, same={self.same}."
            )

    def score(self, similarity: float) -> float:
        """A similarity on the scale of rewards: linear between the anchors, clamped outside them."""
        share = (similarity - self.different) / (self.same - self.different)
        return SCORE_MIN + (SCORE_MAX - SCORE_MIN) * min(max(share, 0.0), 1.0)


class FaceEmbedder(ABC):
    """Finds the faces of images and embeds them."""

    @property
    @abstractmethod
    def anchors(self) -> SimilarityAnchors:
        """Where this embedder's similarities of different people and of the same person lie."""

    @abstractmethod
    def faces(self, images: Tensor) -> list[list[Face]]:
        """Detect and embed.

        Args:
            images: float32 (N, 3, H, W) in [0, 1], on the CPU.

        Returns:
            for each image its faces, in any order; an empty list where there is none. What is found in an image does
            not depend on the others.
        """


class FaceIdentityReward(Reward):
    """How well an edit keeps the people of its source, 1..5.

    - The source has no face (or there is no source at all): NaN, there is nobody to keep.
    - The source has a face, the output has none: 1.
    - Several faces: sources are paired with outputs so that the sum of similarities is largest, and the score is
      the mean over the *source's* faces; one that has no partner counts 1. Further faces in the output cost
      nothing.

    A pair's similarity (cosine) becomes a score by a line through (``different``, 1) and (``same``, 5).

    Args:
        embedder: finds and embeds faces.
        anchors: the similarities that score 1 and 5; None takes the embedder's own.
    """

    def __init__(self, embedder: FaceEmbedder, anchors: SimilarityAnchors | None = None) -> None:
        self.embedder = embedder
        self.anchors = anchors or embedder.anchors

    @torch.no_grad()
    def score(self, samples: Samples) -> Tensor:
        """Score a batch; NaN where the source shows no face, or an image is not finite."""
        scores = torch.full((len(samples),), torch.nan)
        if samples.sources is None:
            return scores
        outputs, finite_outputs = finite_images(samples.images)
        sources, finite_sources = finite_images(samples.sources)
        rows = (finite_outputs & finite_sources).nonzero().flatten()
        before = dict(zip(rows.tolist(), self._source_faces(sources[rows]), strict=True))
        seen = [row for row, faces in before.items() if faces]
        after = self.embedder.faces(outputs[seen]) if seen else []
        for row, faces in zip(seen, after, strict=True):
            scores[row] = self._compare(before[row], faces)
        return scores

    def _source_faces(self, sources: Tensor) -> list[list[Face]]:
        """Faces of each source; a group shares its source, so each different one is looked at once."""
        if not len(sources):
            return []
        different, positions = torch.unique(sources, dim=0, return_inverse=True)
        faces = self.embedder.faces(different)
        return [faces[position] for position in positions.tolist()]

    def _compare(self, before: list[Face], after: list[Face]) -> float:
        if not after:
            return SCORE_MIN
        sources_SD, outputs_FD = (torch.stack([face.embedding for face in faces]) for faces in (before, after))
        similarity_SF = (sources_SD @ outputs_FD.T).numpy()
        scores = [SCORE_MIN] * len(before)
        for source, output in zip(*linear_sum_assignment(similarity_SF, maximize=True), strict=True):
            scores[source] = self.anchors.score(float(similarity_SF[source, output]))
        return fmean(scores)
