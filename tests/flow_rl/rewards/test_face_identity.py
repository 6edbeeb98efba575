from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flow_rl.rewards.base import Reward, Samples
from flow_rl.rewards.face import Face, FaceEmbedder, FaceIdentityReward, SimilarityAnchors

ANCHORS = SimilarityAnchors(different=0.2, same=0.7)


def _unit(degrees: float) -> torch.Tensor:
    return torch.tensor([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))])


class Scripted(FaceEmbedder):
    """Faces by an image's first value: entry i of the script is image i / 100; a face is an angle."""

    def __init__(self, script: list[list[float]]) -> None:
        self.script = script
        self.seen: list[int] = []

    @property
    def anchors(self) -> SimilarityAnchors:
        return ANCHORS

    def faces(self, images: torch.Tensor) -> list[list[Face]]:
        keys = (images[:, 0, 0, 0] * 100).round().int().tolist()
        self.seen += keys
        return [[Face(box=(0, 0, 1, 1), embedding=_unit(angle)) for angle in self.script[key]] for key in keys]


def _images(keys: list[int]) -> torch.Tensor:
    return torch.tensor(keys).view(-1, 1, 1, 1).expand(-1, 3, 4, 4) / 100


def _samples(sources: list[int] | None, outputs: list[int]) -> Samples:
    return Samples(
        images=_images(outputs),
        prompts=["an edit"] * len(outputs),
        categories=["portrait"] * len(outputs),
        sources=None if sources is None else _images(sources),
    )


def _line(cosine: float) -> float:
    return 1 + 4 * min(max((cosine - 0.2) / 0.5, 0), 1)


def test_one_face_scores_the_line_between_the_anchors() -> None:
    angles = [0, 30, 46, 60, 70, 80, 90, 180]
    script = [[angle] for angle in angles]
    reward = FaceIdentityReward(Scripted(script))
    assert isinstance(reward, Reward)
    scores = reward.score(_samples([0] * 8, list(range(8))))
    assert scores.dtype == torch.float32
    expected = [_line(math.cos(math.radians(angle))) for angle in angles]
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert scores[0] == scores[1] == 5
    assert scores[-2] == scores[-1] == 1
    assert (scores.diff() <= 0).all()
    wider = FaceIdentityReward(Scripted(script), SimilarityAnchors(different=-1, same=1))
    np.testing.assert_allclose(
        wider.score(_samples([0] * 8, list(range(8)))), [3 + 2 * math.cos(math.radians(a)) for a in angles], atol=1e-5
    )


def test_rules_for_missing_faces() -> None:
    script = [[], [0.0], [0.0, 90.0]]
    #             no source face | lost face | lost both | one of two lost | one added
    scores = FaceIdentityReward(Scripted(script)).score(_samples([0, 0, 1, 2, 2, 1], [0, 1, 0, 0, 1, 2]))
    assert scores[:2].isnan().all()
    assert scores[2:].tolist() == [1, 1, 3, 5]


def test_without_sources_nothing_can_be_scored() -> None:
    embedder = Scripted([[0.0]])
    assert FaceIdentityReward(embedder).score(_samples(None, [0, 0])).isnan().all()
    assert embedder.seen == []


def test_faces_are_matched_whatever_their_order() -> None:
    script = [[0.0, 60.0, 120.0], [118.0, 3.0, 61.0, 240.0], [60.0, 20.0]]
    reward = FaceIdentityReward(Scripted(script))
    assert reward.score(_samples([0], [1])).item() == 5
    # 60 stays 60; of the other two, 0 -> 20 (cosine 0.94) is the better partner, and 120 is lost.
    assert reward.score(_samples([0], [2])).item() == pytest.approx((5 + 5 + 1) / 3)


def test_images_that_are_not_finite_are_masked_and_a_groups_source_is_seen_once() -> None:
    embedder = Scripted([[0.0], [10.0]])
    samples = _samples([0, 0, 0, 0, 1], [0, 1, 0, 1, 0])
    images, sources = samples.images.clone(), samples.sources.clone()
    images[1, 0, 2, 2], sources[2, 1, 3, 3] = torch.nan, torch.inf
    scores = FaceIdentityReward(embedder).score(
        Samples(images=images, prompts=samples.prompts, categories=samples.categories, sources=sources)
    )
    assert scores.isnan().tolist() == [False, True, True, False, False]
    assert sorted(embedder.seen) == [0, 0, 0, 1, 1]  # two different sources, three outputs


def test_bad_input_is_told_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"different < same, received different=0\.7, same=0\.2"):
        SimilarityAnchors(different=0.7, same=0.2)
    with pytest.raises(ValueError, match="norm 2: divide it by its norm"):
        Face(box=(0, 0, 1, 1), embedding=torch.tensor([2.0, 0.0]))
    with pytest.raises(ValueError, match="norm nan"):
        Face(box=(0, 0, 1, 1), embedding=torch.tensor([torch.nan, 0.0]))
