"""The demo's edit files, and its rewards for edits on results whose worth is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.edit_pairs import read_edits
from demo.making.edit_prompts import COUNTS, FIRST_ID, edit_of, write_edits
from demo.making.prompts import COUNTS as PROMPT_COUNTS
from demo.scorers.edit_rewards import EditConsistencyReward, EditSuccessReward, unchanged
from demo.world.dataset import render_edits
from demo.world.world import SPLITS, render, split_of
from flow_rl.models.images import from_uint8
from flow_rl.rewards import Samples


def test_files_hold_what_the_seed_says(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in write_edits(tmp_path, "validation", 4).read_text().splitlines()]
    table = read_edits(str(tmp_path / "validation.jsonl"), 32)
    for index, line in enumerate(lines):
        number, pair = edit_of("validation", index)
        assert (line["id"], line["instruction"], line["category"]) == (number, pair.instruction, pair.category)
        assert table.ids[index] == number
        with Image.open(tmp_path / line["target"]) as target:
            assert np.array_equal(np.array(target), render(pair.target))
    pixels = (table.select([2]).sources[0] * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)
    assert np.array_equal(pixels, render(edit_of("validation", 2)[1].source))
    assert "target" not in json.loads(write_edits(tmp_path, "train", 1).read_text())


def test_ids_and_splits_do_not_meet() -> None:
    ids = [edit_of(split, index)[0] for split in SPLITS for index in (0, COUNTS[split] - 1)]
    assert ids == sorted(set(ids))
    assert ids[0] == FIRST_ID > sum(PROMPT_COUNTS.values())
    for split in SPLITS:
        for index in range(4):
            pair = edit_of(split, index)[1]
            assert {split_of(pair.category, s.attributes) for s in (pair.source, pair.target)} == {split}


@pytest.fixture(scope="module")
def pairs() -> tuple[Samples, torch.Tensor]:
    """Sources as the results, and the targets beside them."""
    data = render_edits(77, range(40), "test")
    sources = from_uint8(data.sources)
    samples = Samples(images=sources, prompts=data.instructions, categories=data.categories, sources=sources)
    return samples, from_uint8(data.targets)


def result(samples: Samples, images: torch.Tensor, **changes) -> Samples:
    kept = {"prompts": samples.prompts, "categories": samples.categories, "sources": samples.sources}
    return Samples(images=images, **(kept | changes))


@pytest.fixture(params=["annotator", "judge"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_success_is_high_for_the_target_and_low_for_the_source(pairs, name: str) -> None:
    samples, targets = pairs
    for reward in (EditSuccessReward(name), EditSuccessReward(name, measure="accuracy")):
        done, undone = reward.score(result(samples, targets)), reward.score(samples)
        assert done.dtype == torch.float32
        assert float(done.mean()) > 4.5
        assert float(undone.mean()) < 1.5
    assert set(undone.tolist()) <= {1.0, 5.0}


def test_consistency_is_kept_by_source_and_target_and_lost_by_anything_else(pairs, name: str) -> None:
    samples, targets = pairs
    reward = EditConsistencyReward(name)
    still, right = reward.score(samples), reward.score(result(samples, targets))
    assert float(still.mean()) > 4.8
    assert float(right.mean()) > 4.6
    generator = torch.Generator().manual_seed(0)
    noisy = (targets + 0.25 * torch.randn(targets.shape, generator=generator)).clamp(0, 1)
    same = [i for i, c in enumerate(samples.categories) if c == "portrait"]
    others = targets.clone()
    others[same] = targets[same].roll(1, dims=0)  # another person, who may well have what is asked for
    for worse in (noisy, others):
        found = reward.score(result(samples, worse))
        assert float((found < right).float().mean()) > 0.35
        assert float(found.mean()) < float(right.mean()) - 0.3


def test_what_is_no_edit_is_nan(pairs, name: str) -> None:
    samples, targets = pairs
    broken = targets.clone()
    broken[1, 0, 0, 0] = torch.nan
    prompts = ["paint it black", *samples.prompts[1:]]
    categories = [*samples.categories[:-1], "landscape"]
    for reward in (EditSuccessReward(name), EditConsistencyReward(name)):
        scores = reward.score(result(samples, broken, prompts=prompts, categories=categories))
        assert scores.isnan().nonzero().flatten().tolist() == [0, 1, len(targets) - 1]
        assert reward.score(result(samples, targets, sources=None)).isnan().all()


def test_pixels_that_an_edit_may_change_do_not_count() -> None:
    source = torch.zeros(1, 3, 10, 10)
    image = source.clone()
    image[:, :, :3] = 1.0  # three pixels of ten, and far away
    assert float(unchanged(image, source, [0.3])) == 1.0
    assert float(unchanged(image, source, [0.0])) == pytest.approx(0.7, abs=1e-4)
