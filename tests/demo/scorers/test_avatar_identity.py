from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from demo.making.measure_identity import people
from demo.making.train_identity import SCALE, arcface_logits, without_face
from demo.scorers.identity import WEIGHTS, AvatarEmbedder, IdentityNet, edit_once, is_held_out, person, vary
from demo.world.degrade import break_patches
from demo.world.edits import EDITABLE, make_edit
from demo.world.render import details
from demo.world.vocabulary import CATEGORIES
from demo.world.world import Scene, keyed_rng, make_scene, render
from flow_rl.rewards.base import Samples
from flow_rl.rewards.face import FaceIdentityReward

COUNT = 40
SEED = 909  # a stream that neither training nor the committed table has used


def _images(scenes: list[Scene]) -> torch.Tensor:
    return torch.from_numpy(np.stack([render(scene) for scene in scenes])).permute(0, 3, 1, 2).float() / 255


def _samples(sources: torch.Tensor, images: torch.Tensor) -> Samples:
    n = len(images)
    return Samples(images=images, prompts=["an edit"] * n, categories=["portrait"] * n, sources=sources)


@pytest.fixture(scope="module")
def reward() -> FaceIdentityReward:
    return FaceIdentityReward(AvatarEmbedder())


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return people(SEED, COUNT, held_out=True)


@pytest.fixture(scope="module")
def sources(scenes: list[Scene]) -> torch.Tensor:
    return _images(scenes)


def test_people_are_split_by_who_they_are(scenes: list[Scene]) -> None:
    assert len({person(scene) for scene in scenes}) == COUNT
    assert all(is_held_out(scene) for scene in scenes)
    trained = people(SEED, COUNT, held_out=False)
    assert not {person(scene) for scene in trained} & {person(scene) for scene in scenes}
    for index, scene in enumerate(scenes):
        before, after = person(scene), person(vary(scene, keyed_rng(SEED, index)))
        assert sum(a != b for a, b in zip(before, after, strict=True)) <= 1
        assert before[:3] == after[:3]
    pair = make_edit(SEED, 0, split="test", category="portrait")
    assert person(pair.source)[:3] == person(pair.target)[:3]


def test_held_out_people_are_recognised_after_an_edit(
    reward: FaceIdentityReward, scenes: list[Scene], sources: torch.Tensor
) -> None:
    net = reward.embedder.net
    gallery = net(sources)[0]
    hits, scores, others = [], [], []
    for column, attribute in enumerate(EDITABLE["portrait"]):
        edited = [edit_once(scene, attribute, keyed_rng(SEED, row, column)) for row, scene in enumerate(scenes)]
        rows = [row for row, scene in enumerate(edited) if scene is not None]
        images = _images([scene for scene in edited if scene is not None])
        hits += (net(images)[0] @ gallery.T).argmax(1).eq(torch.tensor(rows)).tolist()
        scores.append(reward.score(_samples(sources[rows], images)))
        others.append(reward.score(_samples(sources[rows].roll(1, 0), images)))
    same, different = torch.cat(scores), torch.cat(others)
    assert np.mean(hits) > 0.75  # a gallery of 40; of 240 it is in the committed table
    assert same.mean() > different.mean() + 2
    assert (same[:, None] > different[None]).float().mean() > 0.95


def test_another_skin_scores_below_another_background(
    reward: FaceIdentityReward, scenes: list[Scene], sources: torch.Tensor
) -> None:
    skins = details("portrait")["skinColor"]
    accessory = [edit_once(scene, "background", keyed_rng(SEED, row)) or scene for row, scene in enumerate(scenes)]
    recoloured = [
        replace(scene, options=scene.options | {"skinColor": skins[(skins.index(scene.options["skinColor"]) + 1) % 4]})
        for scene in scenes
    ]
    kept = reward.score(_samples(sources, _images(accessory)))
    changed = reward.score(_samples(sources, _images(recoloured)))
    assert kept.mean() > 4.5
    assert changed.mean() < kept.mean() - 0.7


def test_what_shows_no_portrait_has_no_face(reward: FaceIdentityReward, sources: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    others = _images(
        [make_scene(SEED, i, split="test", category=c) for c in CATEGORIES if c != "portrait" for i in range(10)]
    )
    pieces = break_patches(sources, torch.ones(COUNT), generator).clamp(0, 1)
    assert all(len(found) == 1 for found in reward.embedder.faces(sources))
    assert not any(reward.embedder.faces(others))
    assert reward.score(_samples(others, sources[:40])).isnan().all()
    lost = reward.score(_samples(sources[:40], others))
    assert lost.eq(1).all()
    assert reward.score(_samples(sources, pieces)).eq(1).float().mean() > 0.9


def test_a_face_does_not_depend_on_the_batch(reward: FaceIdentityReward, sources: torch.Tensor) -> None:
    together = reward.embedder.faces(sources[:6])
    for image, (face,) in zip(sources[:6], together, strict=True):
        ((alone,),) = reward.embedder.faces(image[None])
        torch.testing.assert_close(alone.embedding, face.embedding, atol=1e-5, rtol=0)


def test_the_loss_is_arcface() -> None:
    generator = torch.Generator().manual_seed(1)
    embeddings = F.normalize(torch.randn(5, 8, generator=generator), dim=-1)
    centers, labels = torch.randn(4, 8, generator=generator), torch.tensor([0, 3, 1, 1, 2])
    logits = arcface_logits(embeddings, centers, labels, 0.3).double()
    for row in range(5):
        for column in range(4):
            a, b = embeddings[row].double().numpy(), centers[column].double().numpy()
            angle = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
            expected = SCALE * np.cos(angle + (0.3 if labels[row] == column else 0))
            assert logits[row, column].item() == pytest.approx(expected, abs=1e-3)


def test_images_without_a_face_are_made_from_others_and_portraits(sources: torch.Tensor) -> None:
    images = without_face(sources.flip(0), sources, torch.Generator().manual_seed(0))
    assert images.shape == sources.shape
    assert ((images >= 0) & (images <= 1)).all()
    assert (images - sources).flatten(1).abs().amax(1).min() > 0.05


def test_weights_are_small_and_their_absence_is_told(tmp_path: Path) -> None:
    assert sum(p.numel() for p in IdentityNet().parameters()) < 300_000
    assert WEIGHTS.stat().st_size <= 1e6
    with pytest.raises(FileNotFoundError, match=r"python -m demo\.making\.train_identity"):
        AvatarEmbedder(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=r"received \(1, 3, 16, 16\)"):
        IdentityNet()(torch.zeros(1, 3, 16, 16))
