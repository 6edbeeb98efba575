"""Gradients, votes and shards of two ranks, against what one process computes in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tests.dist.dist_checks import reference, run_checks
from tests.processes import launch

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    record = tmp_path_factory.mktemp("checks") / "record"
    launch(partial(run_checks, str(record), 2), 2)
    return [torch.load(f"{record}.{rank}", weights_only=False) for rank in range(2)]


def test_gradients_are_averaged_where_any_rank_has_one(found) -> None:
    for rank in found:
        first, second, third = rank["gradients"]["means"]
        assert first.tolist() == [1.5, 3.0, 4.5]
        assert second.tolist() == [0.5] * 3
        assert third is None
        norm = (1.5**2 + 3**2 + 4.5**2 + 3 * 0.25) ** 0.5
        assert float(rank["gradients"]["norm"]) == pytest.approx(norm)
        assert rank["gradients"]["clipped"][0].tolist() == pytest.approx([1.5 / norm, 3 / norm, 4.5 / norm], rel=1e-5)


def test_all_ranks_hear_the_same_vote(found) -> None:
    for rank in found:
        assert rank["votes"]["any"] == [True, False]
        assert rank["votes"]["finite"] == [True, False]
        assert rank["votes"]["over"] == {"loss": 1.5, "ratio_max": 1.0, "some": 4.0}


def test_sizes_that_do_not_divide_survive_a_checkpoint(found) -> None:
    for rank in found:
        shards = rank["shards"]
        tree, whole = shards["tree"], shards["whole"]
        for tensor, rows in ((tree["a"][0], 1), (tree["a"][1]["b"][0], 3), (tree[5], 4), (tree["seven"], 7)):
            assert torch.equal(tensor, whole[str(rows)])
        assert tree["a"][1]["b"][1] == 2
        assert shards["stays_whole"]
        assert all(found == made for found, made in shards["layouts"])
        assert torch.equal(shards["copied"][0], whole["7"])
        assert torch.equal(shards["copied"][1], whole["7"])
        assert torch.equal(shards["copied"][2], whole["3"])


@pytest.mark.parametrize("way", ["plain", "fused", "late", "gathered"])
def test_sharded_training_is_that_of_the_whole_batch(found, way: str) -> None:
    expected = reference(2)
    for rank in found:
        trained = rank["training"][way]
        for norm, other in zip(trained["norms"], expected["norms"], strict=True):
            assert float(norm) == pytest.approx(float(other), rel=1e-5)
        for weight, other in zip(trained["weights"], expected["weights"], strict=True):
            torch.testing.assert_close(weight.double(), other, rtol=1e-4, atol=1e-5)


def test_forwards_of_gathered_weights_communicate_nothing(found) -> None:
    assert [rank["training"]["gathered"]["collectives"] for rank in found] == [0, 0]
