from __future__ import annotations

import json
import math
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image

from rewards.base import Reward, Samples
from rewards.dlib_faces import DlibEmbedder
from rewards.face import FaceIdentityReward
from rewards.face_api_weights import load_weights
from rewards.tiny_face_detector import TinyFaceDetector

ASSETS = Path(__file__).parents[1] / "assets"
WEIGHTS = ASSETS / "face_api"
SAME = ("obama-1", "obama-2", "obama-3", "obama-1-left-cut", "obama-1-right-cut")
OTHER = "biden"


@pytest.fixture(scope="module")
def embedder() -> DlibEmbedder:
    return DlibEmbedder(WEIGHTS)


@pytest.fixture(scope="module")
def photos() -> dict[str, torch.Tensor]:
    loaded = {}
    for name in (*SAME, OTHER):
        pixels = np.array(Image.open(ASSETS / "faces" / f"{name}.jpg").convert("RGB").resize((480, 480)))
        loaded[name] = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    return loaded


def _synthetic(size: int) -> torch.Tensor:
    """The image that the published package was given for ``outputs.json``."""
    y, x, c = np.meshgrid(np.arange(size), np.arange(size), np.arange(3), indexing="ij")
    values = (37 * x + 91 * y + 53 * c + 5 * ((x * y) % 17) + (x * x) // 7) % 256
    return torch.from_numpy(values).permute(2, 0, 1)[None].float() / 255


def test_networks_answer_as_the_published_package_does(embedder: DlibEmbedder) -> None:
    published = json.loads((WEIGHTS / "outputs.json").read_text(encoding="utf-8"))
    with torch.no_grad():
        descriptor = embedder.descriptors(_synthetic(150))[0]
        grid = embedder.detector.grid(_synthetic(416)).permute(0, 2, 3, 1)
    np.testing.assert_allclose(descriptor, published["descriptor"], atol=2e-5)
    assert list(grid.shape) == published["grid_shape"]
    np.testing.assert_allclose(grid.flatten()[::61], published["grid_every_61st"], atol=2e-4)


def test_the_same_person_is_above_every_different_person(
    embedder: DlibEmbedder, photos: dict[str, torch.Tensor]
) -> None:
    faces = {name: embedder.faces(photo[None])[0] for name, photo in photos.items()}
    assert {name: len(found) for name, found in faces.items()} == dict.fromkeys(photos, 1)
    vectors = {name: found[0].embedding for name, found in faces.items()}
    same = [float(vectors[a] @ vectors[b]) for a, b in combinations(SAME, 2)]
    different = [float(vectors[name] @ vectors[OTHER]) for name in SAME]
    assert min(same) > max(different) + 0.03
    pairs = [*combinations(SAME, 2), *((name, OTHER) for name in SAME)]
    scores = FaceIdentityReward(embedder).score(
        Samples(
            images=torch.stack([photos[b] for _, b in pairs]),
            prompts=["make it a painting"] * len(pairs),
            categories=["portrait"] * len(pairs),
            sources=torch.stack([photos[a] for a, _ in pairs]),
        )
    )
    assert scores[: len(same)].min() > scores[len(same) :].max() + 1


def test_two_people_in_one_picture(embedder: DlibEmbedder, photos: dict[str, torch.Tensor]) -> None:
    def pair(left: str, right: str) -> torch.Tensor:
        # Only heads, so that they are large enough for the detector in a picture twice as wide as high.
        return torch.cat([photos[name][:, 40:340, 110:410] for name in (left, right)], dim=2)

    source, blank = pair("obama-1", OTHER), torch.full((3, 300, 600), 0.5)
    images = torch.stack([source, pair(OTHER, "obama-1"), pair(OTHER, OTHER), blank, source])
    sources = torch.stack([source] * 4 + [blank])
    assert [len(found) for found in embedder.faces(images)] == [2, 2, 2, 0, 2]
    scores = FaceIdentityReward(embedder).score(
        Samples(images=images, prompts=["mirror it"] * 5, categories=["portrait"] * 5, sources=sources)
    )
    assert scores[0] == 5
    assert scores[1] > 4.5  # people may change places
    assert scores[2] < scores[1] - 1  # one of the two was replaced
    assert scores[3] == 1
    assert scores[4].isnan()


def test_a_face_does_not_depend_on_the_batch_and_boxes_follow_the_face(
    embedder: DlibEmbedder, photos: dict[str, torch.Tensor]
) -> None:
    image = photos["obama-1"]
    moved = torch.roll(image, (40, -60), dims=(1, 2))
    together = embedder.faces(torch.stack([photos[OTHER], image, moved]))
    ((alone,),) = embedder.faces(image[None])
    torch.testing.assert_close(together[1][0].embedding, alone.embedding, atol=1e-5, rtol=0)
    shift = np.array(together[2][0].box) - np.array(alone.box)
    np.testing.assert_allclose(shift, [-60, 40, -60, 40], atol=25)
    left, top, right, bottom = alone.box
    assert left < 262 < right  # the nose, by eye
    assert top < 165 < bottom


def test_weights_are_decoded_from_their_bytes(tmp_path: Path) -> None:
    entries = [
        {"name": "a/filters", "shape": [1, 1, 2, 3], "dtype": "float32"},
        {"name": "b", "shape": [3], "dtype": "float32", "quantization": {"dtype": "uint8", "scale": 0.5, "min": -1.0}},
        {"name": "c", "shape": [2, 2], "dtype": "float32"},
    ]
    (tmp_path / "m-weights_manifest.json").write_text(json.dumps([{"weights": entries, "paths": ["m.bin"]}]))
    data = np.arange(6, dtype="<f4").tobytes() + bytes([0, 2, 255]) + np.array([1, 2, 3, 4], dtype="<f4").tobytes()
    (tmp_path / "m.bin").write_bytes(data)
    weights = load_weights(tmp_path, "m")
    assert weights["a/filters"].tolist() == [[[[0]], [[3]]], [[[1]], [[4]]], [[[2]], [[5]]]]
    assert weights["b"].tolist() == [-1, 0, 126.5]
    assert weights["c"].tolist() == [[1, 3], [2, 4]]
    (tmp_path / "m.bin").write_bytes(data[:-1])
    with pytest.raises(ValueError, match="ends at byte 42, inside of 'c'"):
        load_weights(tmp_path, "m")
    (tmp_path / "m.bin").write_bytes(data + b"!")
    with pytest.raises(ValueError, match="has 44 bytes, its manifest describes 43"):
        load_weights(tmp_path, "m")


def test_bad_input_is_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="npm pack @vladmandic/face-api"):
        DlibEmbedder(tmp_path)
    for file in WEIGHTS.glob("tiny_face_detector*"):
        shutil.copy(file, tmp_path)
    with pytest.raises(FileNotFoundError, match="face_recognition_model"):
        DlibEmbedder(tmp_path)
    with pytest.raises(ValueError, match=r"received 100, 0\.5"):
        TinyFaceDetector(WEIGHTS, input_size=100)
    with pytest.raises(ValueError, match=r"margin must be at least 1, received 0\.5"):
        DlibEmbedder(WEIGHTS, margin=0.5)


def test_a_box_decodes_by_the_papers_formula() -> None:
    # YOLO9000 (arXiv 1612.08242), section 2: b = sigmoid(t) + cell, size = anchor exp(t).
    grid = torch.zeros(1, 25, 13, 13)
    grid[0, 5:10, 4, 7] = torch.tensor([0.3, -0.7, 0.2, -0.4, 2.0])  # second anchor, row 4, column 7
    boxes, scores = TinyFaceDetector.decode(grid)
    best = int(scores.argmax())
    assert scores[best].item() == pytest.approx(1 / (1 + math.exp(-2)))
    left, top, right, bottom = (13 * boxes[best]).tolist()
    assert (left + right) / 2 == pytest.approx(7 + 1 / (1 + math.exp(-0.3)), abs=1e-5)
    assert (top + bottom) / 2 == pytest.approx(4 + 1 / (1 + math.exp(0.7)), abs=1e-5)
    assert right - left == pytest.approx(6.041143 * math.exp(0.2), abs=1e-5)
    assert bottom - top == pytest.approx(7.080126 * math.exp(-0.4), abs=1e-5)


def test_a_config_builds_the_reward() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=Reward)
    embedder = {"class_path": "rewards.dlib_faces.DlibEmbedder", "init_args": {"directory": str(WEIGHTS)}}
    config = {
        "class_path": "rewards.face.FaceIdentityReward",
        "init_args": {"embedder": embedder, "anchors": {"different": 0.7, "same": 0.9}},
    }
    reward = parser.instantiate_classes(parser.parse_object({"reward": config})).reward
    assert isinstance(reward, FaceIdentityReward)
    assert reward.anchors.score(0.8) == pytest.approx(3)
    assert reward.embedder.margin == 1
