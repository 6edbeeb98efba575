from __future__ import annotations

import json
import math
from collections import defaultdict

import numpy as np
import pytest
import torch

from demo.scorers.exact import read_cards
from demo.scorers.sets import load_verifier
from demo.scorers.verifiers import Verifier
from demo.scorers.weights import ASSETS
from demo.world.captions import caption
from demo.world.degrade import blur
from demo.world.font import text_mask
from demo.world.vocabulary import CATEGORIES, LETTERS
from demo.world.world import Scene, make_scene, render

PER_CATEGORY = 30


def _images(scenes: list[Scene]) -> torch.Tensor:
    pixels = np.stack([render(scene) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module", params=["annotator", "judge", "monitor"])
def verifier(request: pytest.FixtureRequest) -> Verifier:
    return load_verifier(request.param)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    # A stream that neither training nor the committed table has used.
    return [
        make_scene(404, index, split="test", category=category)
        for category in CATEGORIES
        for index in range(PER_CATEGORY)
    ]


@pytest.fixture(scope="module")
def images(scenes: list[Scene]) -> torch.Tensor:
    return _images(scenes)


def test_held_out_accuracy(verifier: Verifier, scenes: list[Scene], images: torch.Tensor) -> None:
    right = defaultdict(list)
    for found, scene in zip(verifier.predict(images, [s.category for s in scenes]), scenes, strict=True):
        for name, value in found.items():
            right[scene.category, name].append(scene.attributes.get(name, "none") == value)
    assert len(right) == 23
    for key, flags in right.items():
        assert np.mean(flags) >= 0.9, key  # 30 images: two wrong readings are chance at 0.95
    assert np.mean([flag for flags in right.values() for flag in flags]) >= 0.98


def test_what_was_asked_for_scores_high_and_another_prompt_low(
    verifier: Verifier, scenes: list[Scene], images: torch.Tensor
) -> None:
    prompts = [caption(scene, 1, index, full=True) for index, scene in enumerate(scenes)]
    right = verifier.check(images, prompts)
    others = [prompts[i - i % PER_CATEGORY + (i + 1) % PER_CATEGORY] for i in range(len(prompts))]
    wrong = verifier.check(images, others)
    assert right.accuracy.dtype == right.probability.dtype == torch.float32
    assert right.accuracy.shape == right.probability.shape == (len(scenes),)
    assert right.accuracy.mean() > 0.98
    assert right.probability.mean() > 0.9
    assert wrong.accuracy.mean() < 0.6
    assert wrong.probability.mean() < 0.6
    for row, scene in enumerate(scenes):
        assert right.requested[row] == scene.attributes
        shares = [right.probabilities[row][name] for name in scene.attributes]
        assert right.probability[row].item() == pytest.approx(np.mean(shares), abs=1e-6)
        if scene.category != "typography":
            hits = [right.predicted[row][name] == value for name, value in scene.attributes.items()]
            assert right.accuracy[row].item() == pytest.approx(np.mean(hits), abs=1e-6)


def test_scores_do_not_depend_on_the_batch(verifier: Verifier, scenes: list[Scene], images: torch.Tensor) -> None:
    prompts = [caption(scene, 1, index) for index, scene in enumerate(scenes)]
    together = verifier.check(images, prompts)
    rows = list(range(0, len(scenes), 11))
    alone = [verifier.check(images[row : row + 1], [prompts[row]]).probability.item() for row in rows]
    np.testing.assert_allclose(together.probability[rows], alone, atol=1e-5)
    order = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = verifier.check(images[order], [prompts[row] for row in order])
    np.testing.assert_allclose(shuffled.probability, together.probability[order], atol=1e-5)
    assert torch.equal(verifier.check(images, prompts).probability, together.probability)


def test_letters_are_credited_one_by_one(verifier: Verifier) -> None:
    scene = make_scene(0, 0, split="train", category="typography")
    options = scene.options | {"text": "KTRL", "inkColor": "#16181d", "cardColor": "#f7f7f7"}
    card = _images([Scene(category="typography", attributes={}, options=options)])
    prompts = ["a card that says K T R L", "a card that says K T R M", "a card that says L T R K"]
    verdict = verifier.check(card.expand(3, -1, -1, -1), prompts)
    assert verdict.accuracy.tolist() == pytest.approx([1.0, 0.75, 0.5])
    assert verdict.predicted[0] == {"text": "KTRL"}
    assert verdict.probability[0] > verdict.probability[1] > verdict.probability[2]
    np.testing.assert_allclose(verdict.probability, [1.0, 0.75, 0.5], atol=0.05)


def test_every_letter_is_read_even_blurred() -> None:
    for count in (1, 2, 4):
        texts = [letter * count for letter in LETTERS]
        masks = torch.from_numpy(np.stack([text_mask(text) for text in texts])).float()
        cards = (0.9 - 0.7 * masks)[:, None].expand(-1, 3, -1, -1)
        for images in (cards, blur(cards, torch.full((26,), 3 / 7))):  # sigma 0, 0.8
            card = read_cards(images)
            assert [card.text(row) for row in range(26)] == texts


def test_an_empty_card_shows_no_letter(verifier: Verifier) -> None:
    card = torch.full((1, 3, 32, 32), 0.97) + 0.02 * torch.randn(
        1, 3, 32, 32, generator=torch.Generator().manual_seed(0)
    )
    verdict = verifier.check(card, ["a card that says K T"])
    assert verdict.probability.item() < 0.05


def test_what_cannot_be_understood_is_nan(verifier: Verifier, images: torch.Tensor) -> None:
    verdict = verifier.check(images[:3], ["a red dog", "a portrait", "a portrait with no glasses"])
    assert verdict.accuracy.isnan().tolist() == [True, True, False]
    assert verdict.probability.isnan().tolist() == [True, True, False]
    assert verdict.requested[:2] == [{}, {}]
    assert math.isfinite(verdict.probability[2])


def test_the_sets_are_different_networks() -> None:
    sizes = [sum(p.numel() for p in load_verifier(name).parameters()) for name in ("annotator", "judge", "monitor")]
    assert len(set(sizes)) == 3
    assert sum(file.stat().st_size for file in ASSETS.glob("*.safetensors")) <= 4e6


def test_the_committed_table_allows_every_attribute() -> None:
    record = json.loads((ASSETS / "accuracy.json").read_text(encoding="utf-8"))
    assert set(record) == {"annotator", "judge", "monitor"}
    for numbers in record.values():
        assert len(numbers["clean"]) == 23
        assert min(numbers["clean"].values()) >= 0.95


def test_bad_input_is_told_what_to_do(verifier: Verifier, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="Unknown verifier 'jduge'"):
        load_verifier("jduge")
    with pytest.raises(ValueError, match=r"shape \(N, 3, 32, 32\), received \(2, 3, 64, 64\)"):
        verifier.predict(torch.zeros(2, 3, 64, 64), ["plant", "plant"])
    with pytest.raises(ValueError, match="one prompt an image, received 1 for 2"):
        verifier.check(images[:2], ["a portrait"])
    with pytest.raises(ValueError, match="Expected 2 categories"):
        verifier.predict(images[:2], ["plant"])
    with pytest.raises(ValueError, match="Did you mean 'plant'"):
        verifier.predict(images[:1], ["plants"])
