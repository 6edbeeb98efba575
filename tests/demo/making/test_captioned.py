"""The data that the base is made from: renders, some of them damaged."""

from __future__ import annotations

import pytest
import torch

from demo.making.captioned import DemoCaptioned, damage_some
from demo.world.world import make_scene, render
from flow_rl.models.images import from_uint8

IMAGE = from_uint8(render(make_scene(0, 0, split="train"))[None])[0]


def test_damage_depends_on_seed_and_index_alone() -> None:
    assert torch.equal(damage_some(IMAGE, 1.0, seed=3, index=5), damage_some(IMAGE, 1.0, seed=3, index=5))
    assert not torch.equal(damage_some(IMAGE, 1.0, seed=3, index=5), damage_some(IMAGE, 1.0, seed=3, index=6))


def test_the_share_that_is_damaged_is_the_one_asked_for() -> None:
    changed = [not torch.equal(damage_some(IMAGE, 0.3, seed=0, index=i), IMAGE) for i in range(400)]
    assert 0.22 < sum(changed) / 400 < 0.38  # 3.5 standard errors
    assert torch.equal(damage_some(IMAGE, 0.0, seed=0, index=1), IMAGE)


def test_damaged_images_stay_in_range() -> None:
    made = torch.stack([damage_some(IMAGE, 1.0, seed=1, index=i) for i in range(50)])
    assert made.min() >= 0
    assert made.max() <= 1


def test_captions_and_sources_stay_as_they_were(tmp_path) -> None:
    common = {"split": "validation", "scenes": 4, "edits": 4, "cache_dir": str(tmp_path), "workers": 0}
    clean, damaged = DemoCaptioned(**common), DemoCaptioned(**common, damaged=1.0)
    for data in (clean, damaged):
        data.prepare()
    for i in range(8):
        (image, text, source), (other, same, kept) = clean[i], damaged[i]
        assert text == same
        assert not torch.equal(image, other)
        assert (source is None and kept is None) or torch.equal(source, kept)


def test_a_share_beyond_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"damaged is 1.5; it is a share"):
        DemoCaptioned(damaged=1.5)
