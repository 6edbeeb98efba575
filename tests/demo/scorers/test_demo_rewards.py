from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.functional import spearman_corrcoef

from demo.scorers.convolutional_quality import ConvolutionalQuality
from demo.scorers.rewards import AttributeReward, QualityReward
from demo.scorers.sets import load_quality
from demo.world.captions import caption
from demo.world.degrade import CORRUPTIONS, corrupt
from demo.world.vocabulary import CATEGORIES
from demo.world.world import make_scene, render
from flow_rl.rewards.base import Reward, Samples


@pytest.fixture(scope="module")
def samples() -> Samples:
    scenes = [make_scene(505, i, split="test", category=c) for c in CATEGORIES for i in range(12)]
    pixels = np.stack([render(scene) for scene in scenes])
    return Samples(
        images=torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255,
        prompts=[caption(scene, 1, i, full=True) for i, scene in enumerate(scenes)],
        categories=[scene.category for scene in scenes],
    )


def _with(samples: Samples, images: torch.Tensor, prompts: list[str] | None = None) -> Samples:
    return Samples(images=images, prompts=prompts or samples.prompts, categories=samples.categories)


@pytest.fixture(params=["annotator", "judge", "monitor"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_scores_keep_the_contract(name: str, samples: Samples) -> None:
    for reward in (AttributeReward(name), AttributeReward(name, measure="accuracy"), QualityReward(name)):
        assert isinstance(reward, Reward)
        scores = reward.score(samples)
        assert scores.shape == (len(samples),)
        assert scores.dtype == torch.float32
        assert ((scores >= 1) & (scores <= 5)).all()
        assert torch.equal(scores, reward.score(samples))
        assert scores.mean() > 4.3
        np.testing.assert_allclose(
            reward.score(_with(samples, samples.images.flip(0), samples.prompts[::-1])),
            scores.flip(0),
            atol=1e-4,
        )


def test_attribute_reward_is_one_plus_four_times_the_share(name: str, samples: Samples) -> None:
    reward = AttributeReward(name, measure="accuracy")
    verdict = reward.verifier.check(samples.images, samples.prompts)
    np.testing.assert_allclose(reward.score(samples), 1 + 4 * verdict.accuracy, atol=1e-6)
    reward = AttributeReward(name)
    np.testing.assert_allclose(reward.score(samples), 1 + 4 * verdict.probability, atol=1e-6)


def test_what_cannot_be_scored_is_nan(name: str, samples: Samples) -> None:
    images = samples.images.clone()
    images[1, 0, 3, 3] = torch.nan
    images[2, 0, 3, 3] = torch.inf
    prompts = ["an unknown thing", *samples.prompts[1:]]
    missing = AttributeReward(name).score(_with(samples, images, prompts)).isnan()
    assert missing.nonzero().flatten().tolist() == [0, 1, 2]
    missing = QualityReward(name).score(_with(samples, images, prompts)).isnan()
    assert missing.nonzero().flatten().tolist() == [1, 2]


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruption_lowers_quality(name: str, kind: str, samples: Samples) -> None:
    generator = torch.Generator().manual_seed(0)
    reward = QualityReward(name)
    means = [
        reward.score(
            _with(samples, CORRUPTIONS[kind](samples.images, torch.full((60,), strength), generator).clamp(0, 1))
        ).mean()
        for strength in (0.0, 0.4, 0.8)
    ]
    # The judge was trained on other damage: it ranks this one less finely.
    margin = 0.15 if name == "judge" else 0.3
    assert means[0] > means[1] + margin
    assert means[1] > means[2] + margin


def test_quality_ranks_known_severities(name: str, samples: Samples) -> None:
    images, severity = corrupt(samples.images.repeat(4, 1, 1, 1), torch.Generator().manual_seed(1))
    scores = load_quality(name)(images)
    assert spearman_corrcoef(scores, -severity) > (0.65 if name == "judge" else 0.85)


def test_severity_zero_is_the_render_itself(samples: Samples) -> None:
    images, severity = corrupt(samples.images, torch.Generator().manual_seed(2))
    untouched = severity == 0
    assert untouched.any()
    assert torch.equal(images[untouched], samples.images[untouched])
    assert ((severity >= 0) & (severity <= 1)).all()
    changed = (images - samples.images).flatten(1).abs().mean(1) > 0
    assert (changed | (severity < 0.15)).all()  # a faint grade may round to no change


def test_bad_input_is_told_what_to_do() -> None:
    with pytest.raises(ValueError, match="Unknown measure 'logit'"):
        AttributeReward(measure="logit")
    with pytest.raises(ValueError, match="Unknown verifier 'critic'"):
        AttributeReward("critic")
    with pytest.raises(ValueError, match="Unknown verifier 'critic'"):
        QualityReward("critic")
    with pytest.raises(ValueError, match=r"received \(1, 3, 16, 16\)"):
        ConvolutionalQuality(width=4)(torch.zeros(1, 3, 16, 16))
