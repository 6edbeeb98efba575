"""The judge has eyes of its own: nothing that rewards, annotates or damages in the demo is part of them."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.functional import spearman_corrcoef

from demo.making.train_judge import targets
from demo.making.train_verifiers import Renders
from demo.scorers.judge_letters import places
from demo.scorers.judge_reader import LETTER_COUNT, SLOTS
from demo.scorers.sets import load_quality, load_verifier
from demo.world.degrade import CORRUPTIONS
from demo.world.font import LAYOUT, text_mask
from demo.world.judge_damage import DAMAGE, disturb, spoil
from demo.world.render import print_card
from demo.world.vocabulary import CATEGORIES
from demo.world.world import make_scene
from tests.demo.scorers.test_verifiers import _images

ROOT = Path(__file__).parents[3]
OTHERS = {
    "demo.scorers.exact",
    "demo.scorers.convolutional_reader",
    "demo.scorers.convolutional_quality",
    "demo.world.degrade",
}


def imported(module: str) -> set[str]:
    """Modules of the demo that a module imports when it is loaded, by way of others too."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        path = ROOT / (waiting.pop().replace(".", "/") + ".py")
        if not path.is_file():  # a name inside of a module
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("demo."):
                names = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)} - found
                found |= names
                waiting += names
    return found


@pytest.mark.parametrize("module", ["judge_reader", "judge_quality"])
def test_the_judges_networks_share_nothing_with_the_others(module: str) -> None:
    assert not imported(f"demo.scorers.{module}") & OTHERS
    assert not imported("demo.world.judge_damage") & OTHERS
    assert imported("demo.scorers.convolutional_reader") & OTHERS  # the test itself can see a shared module


def test_the_judge_is_another_kind_of_network() -> None:
    kinds = {name: type(load_verifier(name)) for name in ("annotator", "monitor", "judge")}
    assert kinds["annotator"] is kinds["monitor"] is not kinds["judge"]
    kinds = {name: type(load_quality(name)) for name in ("annotator", "monitor", "judge")}
    assert kinds["annotator"] is kinds["monitor"] is not kinds["judge"]


def test_targets_name_what_a_scene_shows() -> None:
    scenes = [make_scene(3, index, split="train", category=category) for category in CATEGORIES for index in range(4)]
    images = torch.zeros(len(scenes), 3, 32, 32, dtype=torch.uint8)
    renders = Renders(images=images, categories=[s.category for s in scenes], attributes=[s.attributes for s in scenes])
    for scene, row in zip(scenes, targets(renders).tolist(), strict=True):
        named = {slot: values[index] for (slot, values), index in zip(SLOTS.items(), row, strict=True) if index >= 0}
        assert {category for category, _ in named} == {scene.category}
        shown = {name: value for (_, name), value in named.items() if name != LETTER_COUNT}
        assert shown == {name: scene.attributes.get(name, "none") for name in shown}
        if scene.category == "typography":
            assert named["typography", LETTER_COUNT] == str(len(scene.attributes["text"]))


def test_places_hold_the_letters_of_a_card() -> None:
    # A letter's own look is the same wherever a layout of its scale puts it. A place's margin shows its neighbours.
    shown = {count: torch.from_numpy(text_mask("E" * count)).float().expand(1, 3, 32, 32) for count in LAYOUT}
    for count, card in shown.items():
        looks = places(card, count)
        assert looks.shape == (1, count, 3, 20, 16)
        inside = looks[..., 4:16, 3:13]
        assert torch.allclose(inside, inside[:, :1].expand_as(inside), atol=0.02)
        assert 0.2 < float(looks.mean()) < 0.6


def test_the_judge_reads_letters_and_empty_places() -> None:
    judge = load_verifier("judge")
    cards = [
        print_card(text_mask(text), {"inkColor": "#16181d", "cardColor": "#f7d154"})
        for text in ("Q", "EF", "MWN", "ZSIJ")
    ]
    cards.append(print_card(np.zeros((32, 32), dtype=bool), {"inkColor": "#16181d", "cardColor": "#f7d154"}))
    images = torch.from_numpy(np.stack(cards)).permute(0, 3, 1, 2).float() / 255
    read = judge.predict(images, ["typography"] * 5)
    assert [shown["text"] for shown in read] == ["Q", "EF", "MWN", "ZSIJ", ""]
    asked = judge.probabilities(
        images, ["typography"] * 5, [{"text": "Q"}, {"text": "EF"}, {"text": "MWX"}, {"text": "Q"}, {"text": "Q"}]
    )
    likely = [row["text"] for row in asked]
    assert likely[0] > 0.9 < likely[1]
    assert likely[2] == pytest.approx(2 / 3, abs=0.1)  # two of three letters
    assert max(likely[3:]) < 0.1


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_grows_with_its_strength(kind: str) -> None:
    images = _images([make_scene(5, index, split="train") for index in range(24)])
    distances = []
    for strength in (0.0, 0.3, 0.9):
        made = DAMAGE[kind](images, torch.full((24,), strength), torch.Generator().manual_seed(1)).clamp(0, 1)
        assert made.shape == images.shape
        distances.append(float((made - images).abs().mean()))
    assert distances[0] == pytest.approx(0, abs=1e-5)
    assert distances[0] < distances[1] < distances[2]


def test_spoilt_images_know_their_severity() -> None:
    images = _images([make_scene(6, index, split="train") for index in range(40)])
    made, severity = spoil(images, torch.Generator().manual_seed(2))
    assert ((severity >= 0) & (severity <= 1)).all()
    untouched = severity == 0
    assert untouched.any()
    assert torch.equal(made[untouched], images[untouched])
    assert ((made >= 0) & (made <= 1)).all()
    assert disturb(images, torch.Generator().manual_seed(3)).shape == images.shape


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_the_judge_sees_damage_that_it_was_never_shown(kind: str) -> None:
    images = _images([make_scene(7, index, split="test") for index in range(60)]).repeat(3, 1, 1, 1)
    generator = torch.Generator().manual_seed(4)
    strength = torch.rand(len(images), generator=generator)
    made = CORRUPTIONS[kind](images, strength, generator).clamp(0, 1)
    assert spearman_corrcoef(load_quality("judge")(made), -strength) > 0.4
