"""Suggested tables: against scipy, and on rewards planted to be useless in a known way."""

from __future__ import annotations

import pytest
import torch
import yaml
from scipy import stats

from flow_rl.curation.proposal import (
    in_group_agreement,
    in_group_deviation,
    propose_row,
    propose_table,
    rounded,
    write_proposal,
)
from flow_rl.curation.provenance import Provenance
from flow_rl.curation.scores import CuratedScores

NAMES = ("good", "saturated", "constant", "twin")


def planted(prompts: int = 30, members: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    good = 2 + 2 * torch.rand(prompts, members, generator=generator)
    saturated = 4.9 + 0.1 * torch.rand(prompts, members, generator=generator)
    return torch.stack([good, saturated, torch.full_like(good, 3.0), good * 0.9], dim=2)


def test_spread_and_agreement_equal_scipy() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = (1 + 4 * torch.rand(8, 6, 2, generator=generator)).double().round(decimals=0)  # with ties
    expected = [stats.spearmanr(g[:, 0], g[:, 1]).statistic for g in scores.numpy()]
    assert in_group_agreement(scores)[0, 1].item() == pytest.approx(sum(expected) / len(expected))
    assert in_group_deviation(scores).tolist() == pytest.approx(scores.numpy().std(axis=1).mean(axis=0).tolist())


def test_masked_and_constant_groups_say_nothing_of_agreement() -> None:
    scores = torch.tensor([[[1.0, 2.0], [2.0, 3.0], [3.0, 4.0]], [[1.0, 2.0], [2.0, 2.0], [3.0, 2.0]]]).double()
    assert in_group_agreement(scores)[0, 1].item() == pytest.approx(1.0)
    scores[0, 0, 0] = torch.nan
    assert in_group_agreement(scores)[0, 1].isnan()


def test_useless_rewards_get_little_and_twins_share() -> None:
    row = propose_row("plant", planted(), NAMES)
    assert sum(row.weights.values()) == pytest.approx(1.0)
    assert row.weights["good"] > 4 * row.weights["saturated"]
    assert row.weights["constant"] == pytest.approx(0.1 / 4, abs=0.01)
    assert row.weights["good"] == pytest.approx(row.weights["twin"], abs=0.05)
    assert "nearly saturated" in row.reasons["saturated"]
    assert "says little" in row.reasons["constant"]
    assert "much the same" in row.reasons["good"]
    alone = propose_row("plant", planted()[:, :, :3], NAMES[:3])
    other = propose_row("plant", torch.stack([planted()[:, :, 0], planted().flip(0)[:, :, 3]], dim=2), ("good", "new"))
    assert alone.weights["good"] > row.weights["good"] + 0.2
    assert other.weights["new"] > 0.4


def test_nothing_to_tell_apart_leaves_equal_weights() -> None:
    row = propose_row("plant", torch.full((3, 4, 2), 5.0), ("a", "b"))
    assert row.weights == {"a": 0.5, "b": 0.5}
    row = propose_row("plant", torch.full((3, 4, 2), torch.nan), ("a", "b"))
    assert row.weights == {"a": 0.5, "b": 0.5}
    assert "nothing is known" in row.reasons["a"]


def test_a_reward_that_scored_nothing_of_a_category_gets_no_weight_there() -> None:
    scores = planted()[:, :, :3].clone()
    scores[:, :, 1] = torch.nan
    row = propose_row("plant", scores, NAMES[:3])
    assert row.weights[NAMES[1]] == 0
    assert row.weights[NAMES[0]] > 0 < row.weights[NAMES[2]]
    assert sum(row.weights.values()) == pytest.approx(1.0)


def test_rounded_weights_sum_to_one() -> None:
    for seed in range(50):
        weights = torch.rand(5, generator=torch.Generator().manual_seed(seed)).double()
        weights /= weights.sum()
        found = rounded(weights)
        assert round(sum(found) * 100) == 100
        assert max(abs(a - b) for a, b in zip(found, weights.tolist(), strict=True)) < 0.01


def test_file_is_read_back_as_the_table(tmp_path) -> None:
    scores = planted(4)
    curated = CuratedScores(
        ids=torch.arange(4),
        prompts=torch.arange(4),
        categories=("plant", "hand: left", "plant", "no"),
        reward_names=NAMES,
        scores=scores,
        provenance=Provenance(model="m", rewards={}, rollout={}, sampling={}),
    )
    table = propose_table(curated)
    write_proposal(str(tmp_path / "sub" / "weights.yaml"), table)
    text = (tmp_path / "sub" / "weights.yaml").read_text(encoding="utf-8")
    found = yaml.safe_load(text)
    assert set(found) == {"plant", "hand: left", "no", "default"}
    assert found == {row.category: row.weights for row in table}
    assert all(abs(sum(row.values()) - 1) < 1e-9 for row in found.values())
    assert "# 2 prompts" in text
    assert "headroom" in text
