"""Every scorer of the demo takes pixels from a device and gives the scores that it gives on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from demo.scorers import bench_edit_rewards, bench_rewards, edit_rewards, rewards
from demo.scorers.identity import AvatarEmbedder
from demo.world.dataset import render_edits
from flow_rl.rewards import Reward, Samples
from flow_rl.rewards.face import FaceIdentityReward
from tests.pretended.device import pretended_cuda

SCORERS: dict[str, Callable[[], Reward]] = {
    "attributes": lambda: rewards.AttributeReward("annotator", "probability"),
    "quality": lambda: rewards.QualityReward("annotator"),
    "success": lambda: edit_rewards.EditSuccessReward("annotator", "probability"),
    "consistency": lambda: edit_rewards.EditConsistencyReward("annotator"),
    "identity": lambda: FaceIdentityReward(AvatarEmbedder()),
    "kept": bench_edit_rewards.EditKeptReward,
    "edges": bench_rewards.EdgeReward,
    "palette": bench_rewards.PaletteReward,
    "variety": bench_rewards.VarietyReward,
}


@pytest.fixture(scope="module")
def edits() -> Samples:
    """A few edits; the output is the target with some noise."""
    made = render_edits(0, range(8), "train")
    sources, targets = (torch.from_numpy(x).permute(0, 3, 1, 2) / 255 for x in (made.sources, made.targets))
    noise = torch.rand(targets.shape, generator=torch.Generator().manual_seed(1))
    return Samples(
        images=0.9 * targets + 0.1 * noise,
        prompts=made.instructions,
        categories=made.categories,
        sources=sources,
    )


@pytest.mark.parametrize("name", SCORERS)
def test_scorer_takes_pixels_from_a_device(name: str, edits: Samples) -> None:
    scorer = SCORERS[name]()
    expected = scorer.score(edits)
    with pretended_cuda():
        moved = replace(edits, images=edits.images.cuda(), sources=edits.sources.cuda())
        found = scorer.score(moved).cpu()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
