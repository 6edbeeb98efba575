from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from demo.world.captions import caption
from demo.world.dataset import render_edits, render_scenes
from demo.world.world import make_scene, render


def test_scenes_are_rendered_in_order() -> None:
    data = render_scenes(1, [5, 2, 9], "train")
    assert data.images.shape == (3, 32, 32, 3)
    assert data.images.dtype == np.uint8
    scene = make_scene(1, 2, split="train")
    np.testing.assert_array_equal(data.images[1], render(scene))
    assert data.captions[1] == caption(scene, 1, 2)
    assert data.categories[1] == scene.category


def test_the_cache_returns_what_was_rendered(tmp_path: Path) -> None:
    first = render_edits(1, range(4), "test", cache_dir=tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 1
    again = render_edits(1, range(4), "test", cache_dir=tmp_path)
    np.testing.assert_array_equal(first.targets, again.targets)
    assert first.instructions == again.instructions
    assert sorted(tmp_path.iterdir()) == files
    other = render_edits(2, range(4), "test", cache_dir=tmp_path)
    assert other.instructions != first.instructions
    assert len(list(tmp_path.iterdir())) == 2


def test_the_result_does_not_depend_on_workers() -> None:
    here = render_scenes(1, range(3), "train", category="plant")
    there = render_scenes(1, range(3), "train", category="plant", workers=1)
    np.testing.assert_array_equal(here.images, there.images)
    assert here.captions == there.captions


def test_nothing_to_render_is_refused() -> None:
    with pytest.raises(ValueError, match="indices is empty"):
        render_scenes(1, [], "train")
