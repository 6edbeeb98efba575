from __future__ import annotations

import pytest

from demo.world.captions import Request, caption, parse
from demo.world.vocabulary import CATEGORIES
from demo.world.world import key_attributes, make_scene


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_parse_inverts_captions(split: str) -> None:
    named = set()
    for index in range(1000):
        scene = make_scene(5, index, split=split)
        request = parse(caption(scene, 5, index))
        assert request.category == scene.category
        assert request.attributes
        assert request.attributes.items() <= scene.attributes.items()
        named |= {(scene.category, name) for name in request.attributes}
        full = caption(scene, 5, index, full=True)
        assert parse(full) == Request(category=scene.category, attributes=scene.attributes), full
        assert len(full.split()) <= 24
        if split != "train":
            keys = set(key_attributes(scene.category)) & set(scene.attributes)
            assert keys <= set(request.attributes)
    assert len(named) == 23, "every attribute of every category is named by some caption"


def test_captions_vary_and_repeat() -> None:
    scene = make_scene(5, 0, split="train", category="portrait")
    captions = [caption(scene, 5, index) for index in range(60)]
    assert captions == [caption(scene, 5, index) for index in range(60)]
    assert len(set(captions)) > 30


@pytest.mark.parametrize(
    ("prompt", "category", "attributes"),
    [
        ("a portrait of a person with spiky red hair and round glasses, blue background", "portrait",
         {"hair": "spiky", "hair_color": "red", "glasses": "round", "background": "blue"}),
        ("A person with no glasses, a blonde mohawk and a beard", "portrait",
         {"glasses": "none", "hair": "mohawk", "hair_color": "blonde", "beard": "full"}),
        ("a potted tulip with a pink bloom in a round white pot on a black background", "plant",
         {"kind": "tulip", "bloom": "pink", "pot_shape": "round", "pot": "white", "background": "black"}),
        ("a tall green monster with one eye and horns", "creature",
         {"shape": "tall", "body": "green", "eyes": "one", "top": "horns"}),
        ("a landscape with snowy hills, a black sky and a moon on the left", "landscape",
         {"hills": "snowy", "sky": "black", "orb": "moon", "position": "left"}),
        ("a yellow card that says K T in blue letters", "typography",
         {"card": "yellow", "text": "KT", "ink": "blue"}),
        ("a card that says RL", "typography", {"text": "RL"}),
    ],
)  # fmt: skip
def test_captions_mean_what_they_say(prompt: str, category: str, attributes: dict[str, str]) -> None:
    assert parse(prompt) == Request(category=category, attributes=attributes)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "names no category"),
        ("a red dog", "names no category"),
        ("a potted portrait", "names several categories"),
        ("a portrait with pink hair", "'pink'"),
        ("a person with round glases", "Did you mean 'glasses'"),
        ("a person with red hair and a blue mohawk", "asks for hair_color 'blue' and 'red'"),
        ("a card that says ABCDE", "1 to 4 letters"),
        ("a card that says A B C D E", "1 to 4 letters"),
        ("a landscape with a red sky", "'red'"),
        ("a creature with five eyes", "'five'"),
    ],
)
def test_other_texts_are_refused_with_a_hint(prompt: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(prompt)
    assert message in str(caught.value)


def test_every_category_can_be_asked_for() -> None:
    categories = {make_scene(9, index, split="test").category for index in range(60)}
    assert categories == set(CATEGORIES)
