from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from demo.world import world
from demo.world.font import GLYPHS, LAYOUT, text_mask
from demo.world.render import avatar, palette
from demo.world.vocabulary import ATTRIBUTES, CATEGORIES, LETTERS, allowed
from demo.world.world import Scene, make_scene, render, split_of

SPLITS = ("train", "validation", "test")
PORTRAIT_ZERO = {
    "background": "green",
    "hair": "short",
    "hair_color": "blue",
    "glasses": "none",
    "beard": "none",
    "shirt": "yellow",
}
TYPOGRAPHY_ZERO = {"card": "white", "ink": "black", "text": "ZCS"}


def test_categories_and_their_order() -> None:
    assert CATEGORIES == ("portrait", "plant", "creature", "landscape", "typography")


def test_scenes_are_a_function_of_their_arguments() -> None:
    scene = make_scene(3, 7, split="train")
    assert scene == make_scene(3, 7, split="train")
    others = [
        make_scene(3, 8, split="train"),
        make_scene(4, 7, split="train"),
        make_scene(3, 7, split="test"),
    ]
    assert all(scene.options != other.options for other in others)


def test_scene_zero_is_the_same_on_every_machine() -> None:
    # Written down once: another vocabulary, hash or random stream is a new world and needs a new version.
    assert world.WORLD_VERSION == "1"
    assert make_scene(0, 0, split="train", category="portrait").attributes == PORTRAIT_ZERO
    assert make_scene(0, 0, split="test", category="typography").attributes == TYPOGRAPHY_ZERO


@pytest.mark.parametrize("category", CATEGORIES)
def test_splits_share_no_combination_of_key_attributes(category: str) -> None:
    keys = world.key_attributes(category)
    assert 1 <= len(keys) <= 4
    seen = {
        split: {
            tuple(make_scene(1, i, split=split, category=category).attributes.get(key) for key in keys)
            for i in range(150)
        }
        for split in SPLITS
    }
    assert all(len(combinations) >= 5 for combinations in seen.values())
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


def test_about_eight_in_ten_combinations_are_for_training() -> None:
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list(LETTERS), size=3)) for _ in range(2000)]
    shares = [sum(split_of("typography", {"text": t}) == s for t in texts) / 2000 for s in SPLITS]
    np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.03)


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_value_is_drawn_and_nothing_else(category: str) -> None:
    drawn: dict[str, set[str]] = {}
    for index in range(400):
        scene = make_scene(2, index, split="train", category=category)
        assert allowed(category, scene.attributes)
        for attribute in ATTRIBUTES[category]:
            assert attribute.exists(scene.attributes) == (attribute.name in scene.attributes)
        for name, value in scene.attributes.items():
            drawn.setdefault(name, set()).add(value)
    expected = world.attribute_values(category)
    text = drawn.pop("text", None)
    assert drawn == {name: set(values) for name, values in expected.items() if name != "text"}
    if text is not None:
        assert set("".join(text)) == set(LETTERS)
        assert {len(t) for t in text} == {1, 2, 3, 4}


@pytest.mark.parametrize("category", CATEGORIES)
def test_renders_are_small_rgb_images_with_the_named_flat_colour(category: str) -> None:
    attribute, corner = {"landscape": ("sky", (3, 1)), "typography": ("card", (0, 0))}.get(
        category, ("background", (0, 0))
    )
    for index in range(5):
        scene = make_scene(5, index, split="train", category=category)
        image = render(scene)
        assert image.shape == (32, 32, 3)
        assert image.dtype == np.uint8
        color = palette(category, attribute)[scene.attributes[attribute]]
        expected = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        np.testing.assert_allclose(image[corner], expected, atol=1)


@pytest.mark.parametrize("category", CATEGORIES[:4])
def test_options_are_complete(category: str) -> None:
    """DiceBear resolves our options to themselves, and has nothing that counts left to draw from its seed."""
    scene = make_scene(5, 1, split="train", category=category)
    resolved = avatar(category, scene.options)["options"]
    for name, value in scene.options.items():
        if name.endswith("Color") and name in resolved:
            assert resolved[name] == [value]
        elif name.endswith("Variant") and value and resolved.get(name):
            assert resolved[name] == value
    if category != "landscape":  # hills lie where the seed says
        other = replace(scene, options=scene.options | {"seed": "another"})
        # All but the last rows: a sliver of trousers, below the shirt, has a colour of its own.
        np.testing.assert_array_equal(render(other)[:30], render(scene)[:30])


def test_letters_are_distinct_and_fit() -> None:
    assert set(GLYPHS) == set(LETTERS)
    assert len({glyph.tobytes() for glyph in GLYPHS.values()}) == 26
    for count, boxes in LAYOUT.items():
        mask = text_mask("M" * count)
        ink = sum(GLYPHS["M"].sum() * scale**2 for _, _, scale in boxes)
        assert mask.sum() == ink, "letters overlap or leave the card"


@pytest.mark.parametrize("text", ["", "ABCDE", "a", "A B", "É"])
def test_a_card_refuses_other_texts(text: str) -> None:
    with pytest.raises(ValueError, match="1 to 4 letters A to Z"):
        text_mask(text)


def test_bad_input_is_told_what_to_do() -> None:
    with pytest.raises(ValueError, match="Did you mean 'portrait'"):
        make_scene(0, 0, split="train", category="potrait")
    with pytest.raises(ValueError, match="Did you mean 'validation'"):
        make_scene(0, 0, split="validate")
    with pytest.raises(ValueError, match="must not be negative"):
        make_scene(0, -1, split="train")
    with pytest.raises(ValueError, match="Unknown category 'x'"):
        world.attribute_values("x")


def test_prompt_files_are_what_the_code_writes() -> None:
    from demo.making import prompts

    ids = []
    for split in SPLITS:
        text = (prompts.DIRECTORY / f"{split}.jsonl").read_text(encoding="utf-8")
        assert text == prompts.prompt_lines(split)
        records = [json.loads(line) for line in text.splitlines()]
        assert len(records) == prompts.COUNTS[split]
        assert all(set(record) == {"id", "prompt", "category"} for record in records)
        counts = [sum(record["category"] == category for record in records) for category in CATEGORIES]
        assert len(set(counts)) == 1
        ids += [record["id"] for record in records]
    assert len(set(ids)) == len(ids)


def test_a_scene_cannot_be_reassigned() -> None:
    scene = make_scene(0, 0, split="train")
    with pytest.raises(AttributeError):
        scene.category = "plant"  # type: ignore[misc]
    assert isinstance(scene, Scene)
