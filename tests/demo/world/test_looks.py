"""Who it is: what pixels say is what the render was made with."""

from __future__ import annotations

import pytest

from demo.world.edits import make_edit
from demo.world.looks import LOOKS, look_of, read_look
from demo.world.world import render
from flow_rl.models.images import from_uint8


@pytest.mark.parametrize("category", list(LOOKS))
def test_the_look_is_read_off_a_render_and_survives_an_edit(category: str) -> None:
    seen = set()
    for index in range(40):
        pair = make_edit(11, index, split="validation", category=category)
        for scene in (pair.source, pair.target):
            assert read_look(from_uint8(render(scene)[None])[0], category) == look_of(scene) == look_of(pair.source)
        seen.add(look_of(pair.source))
    assert seen == set(LOOKS[category].values())
