from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image

from demo.scorers.bench_edit_rewards import EditKeptReward, PreservationReward
from demo.scorers.bench_rewards import FACETS, EdgeReward, FacetReward, FidelityReward, PaletteReward, VarietyReward
from demo.scorers.edit_rewards import EditSuccessReward
from demo.world.captions import caption
from demo.world.degrade import CORRUPTIONS
from demo.world.edits import make_edit
from demo.world.vocabulary import ATTRIBUTES, CATEGORIES
from demo.world.wording import WRITERS
from demo.world.world import make_scene, render
from flow_rl.rewards.base import Samples


def _tensor(scenes) -> torch.Tensor:
    return torch.from_numpy(np.stack([render(scene) for scene in scenes])).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def samples() -> Samples:
    scenes = [make_scene(606, i, split="test", category=c) for c in CATEGORIES for i in range(8)]
    return Samples(
        images=_tensor(scenes),
        prompts=[caption(scene, 2, i, full=True) for i, scene in enumerate(scenes)],
        categories=[scene.category for scene in scenes],
    )


def _with(samples: Samples, images: torch.Tensor) -> Samples:
    return Samples(images=images, prompts=samples.prompts, categories=samples.categories)


def test_every_attribute_is_in_one_facet():
    names = {attribute.name for attributes in ATTRIBUTES.values() for attribute in attributes}
    assert sorted(names) == sorted(name for facet in FACETS.values() for name in facet)


@pytest.mark.parametrize("facet", FACETS)
def test_facets_apply_where_asked_for_and_true_renders_pass(facet, samples):
    scores = FacetReward(facet).score(samples)
    assert scores.nanmean() > 4
    asked = [c == "typography" for c in samples.categories]
    if facet == "text":
        assert (~scores.isnan()).tolist() == asked
    # Pictures of other prompts of the same category have some of it wrong.
    shuffled = samples.images.unflatten(0, (5, 8)).roll(3, dims=1).flatten(0, 1)
    assert FacetReward(facet).score(_with(samples, shuffled)).nanmean() < scores.nanmean() - 0.5


def test_true_renders_are_inside_and_damaged_ones_outside(samples, tmp_path):
    reward = FidelityReward(cache_dir=str(tmp_path))
    true = reward.score(samples)
    assert set(true.tolist()) <= {1.0, 5.0}
    assert true.mean() > 4.3
    damaged = CORRUPTIONS["patches"](samples.images, torch.full((40,), 0.7), torch.Generator().manual_seed(0))
    assert reward.score(_with(samples, damaged.clamp(0, 1))).mean() < 1.5


def test_smearing_costs_edges_and_a_strange_ground_costs_palette(samples):
    blurred = CORRUPTIONS["blur"](samples.images, torch.full((40,), 0.7), torch.Generator())
    assert EdgeReward().score(_with(samples, blurred)).mean() < EdgeReward().score(samples).mean() - 0.3
    assert PaletteReward().score(samples).mean() > 4.5
    brown = torch.tensor([0.35, 0.3, 0.15]).view(1, 3, 1, 1).expand(40, 3, 32, 32)
    assert PaletteReward().score(_with(samples, brown)).mean() < PaletteReward().score(samples).mean() - 1


def test_variety_wants_images_that_differ_and_are_right():
    scenes = [make_scene(5, i, split="test", category="creature") for i in range(200)]
    base = scenes[0].attributes
    prompt = WRITERS["creature"]({"body": base["body"]}, np.random.default_rng(0))
    right = [s for s in scenes if s.attributes["body"] == base["body"]][:4]
    wrong = [s for s in scenes if s.attributes["body"] != base["body"]][:4]
    batch = _tensor([*right, *wrong, *[right[0]] * 4])

    def score(rows: slice) -> float:
        part = Samples(images=batch[rows], prompts=[prompt] * 4, categories=["creature"] * 4)
        scores = VarietyReward().score(part)
        assert len(set(scores.tolist())) == 1
        return float(scores[0])

    values = {a.name: len(a.values) for a in ATTRIBUTES["creature"] if a.name != "body"}
    expected = sum(1 - 1 / count for count in values.values())
    differing = [sum(a.attributes[n] != b.attributes[n] for n in values) for a, b in combinations(right, 2)]
    assert score(slice(0, 4)) == pytest.approx(1 + 4 * np.mean(differing) / expected, abs=0.3)
    assert score(slice(4, 8)) == pytest.approx(1.0)  # as different, and none is right
    assert score(slice(8, 12)) == pytest.approx(1.0)  # right, and all alike
    one = Samples(images=batch[:1], prompts=[prompt], categories=["creature"])
    assert VarietyReward().score(one).isnan().all()


def test_edits_done_undone_and_overdone(tmp_path):
    pairs = [make_edit(9, i, split="test") for i in range(24)]
    rows = []
    for i, pair in enumerate(pairs):
        for name, scene in (("s", pair.source), ("t", pair.target)):
            Image.fromarray(render(scene)).save(tmp_path / f"{name}{i}.png")
        rows.append({"id": i, "instruction": pair.instruction, "category": pair.category})
        rows[-1] |= {"source": f"s{i}.png", "target": f"t{i}.png"}
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sources, targets = _tensor([p.source for p in pairs]), _tensor([p.target for p in pairs])

    def edit(images: torch.Tensor) -> Samples:
        return Samples(
            images=images,
            prompts=[p.instruction for p in pairs],
            categories=[p.category for p in pairs],
            sources=sources,
        )

    done, kept, preserved = EditSuccessReward("judge", "accuracy"), EditKeptReward(), PreservationReward(str(path))
    assert done.score(edit(targets)).mean() > 4.3
    assert done.score(edit(sources)).mean() < 1.7
    assert kept.score(edit(targets)).mean() > 4.5
    torch.testing.assert_close(preserved.score(edit(targets)), torch.full((24,), 5.0))
    torch.testing.assert_close(preserved.score(edit(sources)), torch.full((24,), 5.0))
    assert preserved.score(edit(sources.roll(1, dims=0))).mean() < 4
    assert preserved.score(edit(1 - sources)).mean() < 1.5
    unknown = Samples(images=targets[:1], prompts=["sing"], categories=["plant"], sources=sources[:1])
    assert torch.stack([r.score(unknown) for r in (done, kept, preserved)]).isnan().all()


def test_bad_settings_are_named(tmp_path):
    with pytest.raises(ValueError, match="Unknown facet 'color'"):
        FacetReward("color")
    with pytest.raises(ValueError, match=r"demo\.making\.edit_prompts"):
        PreservationReward(str(tmp_path / "none.jsonl"))
    path = tmp_path / "edits.jsonl"
    path.write_text('{"id": 1, "instruction": "x", "source": "a.png", "category": "plant"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="without a target"):
        PreservationReward(str(path))
