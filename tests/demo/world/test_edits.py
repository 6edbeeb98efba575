from __future__ import annotations

import numpy as np
import pytest

from demo.world.edits import EDITABLE, apply_edit, is_edit, make_edit, parse_instruction
from demo.world.world import make_scene, render, split_of


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_pairs_differ_by_one_attribute(split: str) -> None:
    edited = set()
    for index in range(150):
        pair = make_edit(1, index, split=split)
        source, target = pair.source.attributes, pair.target.attributes
        assert source.keys() == target.keys()
        assert [name for name in source if source[name] != target[name]] == [pair.attribute]
        assert target[pair.attribute] == pair.value
        assert pair.category == pair.source.category == pair.target.category
        assert split_of(pair.category, source) == split_of(pair.category, target) == split
        assert parse_instruction(pair.instruction) == (pair.attribute, pair.value)
        changed = {name for name, v in pair.target.options.items() if pair.source.options.get(name) != v}
        assert len({name.removesuffix("Variant").removesuffix("Probability") for name in changed}) == 1
        edited.add(pair.attribute)
    assert len(edited) >= 7


def test_replay_is_pixel_identical_and_the_change_is_local() -> None:
    for index in range(20):
        pair = make_edit(2, index, split="train")
        source, target = render(pair.source), render(pair.target)
        np.testing.assert_array_equal(render(pair.source), source)
        back = apply_edit(pair.target, pair.attribute, pair.source.attributes[pair.attribute]) if is_edit(
            pair.target, pair.attribute, pair.source.attributes[pair.attribute]) else pair.source  # fmt: skip
        np.testing.assert_array_equal(render(back), source)
        differs = (source != target).any(axis=2)
        assert differs.any()
        if pair.attribute == "shirt":
            assert not differs[:20].any()
        if pair.attribute == "background":
            assert differs[0, 0]
        if pair.attribute in ("glasses", "beard", "bloom", "pot"):
            assert differs.mean() < 0.35
            assert not differs[:, 0].any()


def test_pairs_are_a_function_of_their_arguments() -> None:
    assert make_edit(3, 4, split="test") == make_edit(3, 4, split="test")
    assert make_edit(3, 4, split="test") != make_edit(3, 5, split="test")
    assert {make_edit(3, i, split="train", category="plant").category for i in range(5)} == {"plant"}


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("Remove the glasses.", ("glasses", "none")),
        ("give the person round glasses", ("glasses", "round")),
        ("shave the beard off", ("beard", "none")),
        ("change the hairstyle to a mohawk", ("hair", "mohawk")),
        ("make the hair red", ("hair_color", "red")),
        ("make the shirt blue", ("shirt", "blue")),
        ("paint the pot white", ("pot", "white")),
        ("make the bloom pink", ("bloom", "pink")),
        ("make the background black", ("background", "black")),
    ],
)
def test_instructions_mean_what_they_say(text: str, meaning: tuple[str, str]) -> None:
    assert parse_instruction(text) == meaning


def test_bad_input_is_told_what_to_do() -> None:
    with pytest.raises(ValueError, match="Did you mean 'remove the glasses'"):
        parse_instruction("remove the glases")
    with pytest.raises(ValueError, match="No edits for category 'landscape'"):
        make_edit(0, 0, split="train", category="landscape")
    scene = make_scene(0, 0, split="train", category="portrait")
    with pytest.raises(ValueError, match="Cannot change 'bloom'"):
        apply_edit(scene, "bloom", "red")
    assert set(EDITABLE) == {"portrait", "plant"}
