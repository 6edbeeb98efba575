"""ArcFace's plug-in with a stand-in for insightface that looks at real pixels, alone and inside the reward."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser

from flow_rl.rewards.arcface import ArcFaceEmbedder
from flow_rl.rewards.base import Reward, Samples
from flow_rl.rewards.face import FaceIdentityReward

#: people of the stand-in: their colour as insightface sees it (blue, green, red) and the angle of their embedding
PEOPLE = {"ann": ((0, 0, 255), 0.0), "ann, older": ((0, 51, 204), 55.0), "bo": ((255, 0, 0), 100.0)}
SIDE = 6


class FaceAnalysis:
    """Sees a face wherever a square has a person's colour; the last of `PEOPLE` comes first."""

    def __init__(self, **settings: object) -> None:
        assert settings["name"] == "buffalo_l"
        assert settings["allowed_modules"] == ["detection", "recognition"]

    def prepare(self, ctx_id: int, det_size: tuple[int, int]) -> None:
        self.det_size = det_size

    def get(self, image: np.ndarray) -> Iterator[types.SimpleNamespace]:
        assert image.dtype == np.uint8
        assert image.shape[2] == 3
        assert image.flags.c_contiguous
        for colour, angle in reversed(PEOPLE.values()):
            rows, columns = np.nonzero((image == colour).all(axis=2))
            for left in sorted(set(columns))[::SIDE]:
                box = np.array([left, rows.min(), left + SIDE, rows.max() + 1], dtype=np.float32)
                unit = np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))], dtype=np.float32)
                yield types.SimpleNamespace(bbox=box, normed_embedding=unit)


@pytest.fixture(autouse=True)
def _insightface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "insightface", types.ModuleType("insightface"))
    monkeypatch.setitem(sys.modules, "insightface.app", types.SimpleNamespace(FaceAnalysis=FaceAnalysis))


def _picture(*names: str) -> torch.Tensor:
    """A grey picture (3, 16, 32) in [0, 1] with these people side by side."""
    image = torch.full((3, 16, 32), 0.5)
    for place, name in enumerate(names):
        left = 2 + place * (SIDE + 4)
        blue_first = torch.tensor(PEOPLE[name][0]) / 255
        image[:, 4 : 4 + SIDE, left : left + SIDE] = blue_first.flip(0)[:, None, None]
    return image


def _scores(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    samples = Samples(
        images=torch.stack([output for _, output in pairs]),
        prompts=["an edit"] * len(pairs),
        categories=["portrait"] * len(pairs),
        sources=torch.stack([source for source, _ in pairs]),
    )
    return FaceIdentityReward(ArcFaceEmbedder()).score(samples).tolist()


def test_faces_carry_insightfaces_boxes_and_embeddings() -> None:
    first, second = ArcFaceEmbedder().faces(torch.stack([_picture("ann", "bo"), _picture()]))
    assert [face.box for face in first] == [(12.0, 4.0, 18.0, 10.0), (2.0, 4.0, 8.0, 10.0)]
    torch.testing.assert_close(first[1].embedding, torch.tensor([1.0, 0.0]))
    assert second == []


def test_detection_size_reaches_insightface() -> None:
    assert ArcFaceEmbedder(detection_size=320)._app.det_size == (320, 320)


def test_faces_do_not_depend_on_the_batch() -> None:
    images = torch.stack([_picture("bo"), _picture("ann", "bo"), _picture()])
    together = ArcFaceEmbedder().faces(images)
    for image, faces in zip(images, together, strict=True):
        (alone,) = ArcFaceEmbedder().faces(image[None])
        assert [face.box for face in alone] == [face.box for face in faces]
        assert all(torch.equal(a.embedding, b.embedding) for a, b in zip(alone, faces, strict=True))


def test_the_rewards_rules_hold_from_pixels_to_scores() -> None:
    nobody, ann, bo = _picture(), _picture("ann"), _picture("bo")
    both, swapped, aged = _picture("ann", "bo"), _picture("bo", "ann"), _picture("ann, older")
    scores = _scores(
        [
            (nobody, ann),  # nobody to keep
            (ann, nobody),  # the face was lost
            (ann, ann),
            (ann, bo),
            (ann, aged),
            (both, swapped),  # people may change places
            (both, bo),  # one of two was lost
            (both, _picture("bo", "bo")),  # one of two was replaced
            (ann, both),  # somebody joined
        ]
    )
    assert np.isnan(scores[0])
    cosine = np.cos(np.radians(55))
    assert scores[1:] == pytest.approx([1, 5, 1, 1 + 4 * (cosine - 0.1) / 0.5, 5, 3, 3, 5], abs=1e-5)


def test_a_config_builds_the_reward() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=Reward)
    config = {
        "class_path": "flow_rl.rewards.face.FaceIdentityReward",
        "init_args": {
            "embedder": {"class_path": "flow_rl.rewards.arcface.ArcFaceEmbedder", "init_args": {"detection_size": 320}},
            "anchors": {"different": 0.7, "same": 0.9},
        },
    }
    reward = parser.instantiate_classes(parser.parse_object({"reward": config})).reward
    assert isinstance(reward, FaceIdentityReward)
    assert reward.anchors.score(0.8) == pytest.approx(3)
    assert reward.embedder._app.det_size == (320, 320)


def test_a_bad_detection_size_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32, received 100"):
        ArcFaceEmbedder(detection_size=100)


def test_without_insightface_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "insightface", None)
    monkeypatch.setitem(sys.modules, "insightface.app", None)
    with pytest.raises(ImportError, match="pip install insightface onnxruntime"):
        ArcFaceEmbedder()
