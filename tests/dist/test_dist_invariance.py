"""One rank, two ranks, shards or copies: the same samples, losses and gradients, and half of the memory."""

from __future__ import annotations

import pytest
import torch
from lightning import Callback, LightningModule, Trainer

from flow_rl.rl.reward_weights import GroupFilter

pytestmark = pytest.mark.dist

REPLICATED = pytest.param("replicated", marks=pytest.mark.slow)
STAGES = ("flow_pretrain", "reward_finetune", "nft", "clipped", "student")


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """To 1e-5 of the largest entry, all tensors together: float32 sums in another order."""
    assert len(found) == len(expected) > 0
    scale = max(float(e.abs().max()) for e in expected)
    assert scale > 0
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("strategy", ["fsdp2", REPLICATED])
def test_two_ranks_train_as_one_process_does(recorded, stage: str, strategy: str) -> None:
    alone, spread = recorded(stage, "single", 1), recorded(stage, strategy, 2)
    assert spread["losses"].keys() == alone["losses"].keys()
    first = min(alone["losses"])
    for step, expected in alone["losses"].items():
        found = spread["losses"][step]
        assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-7), step
        # Adam divides by the gradient's size: where it is tiny, its rounding is not, in the steps that follow.
        assert found == pytest.approx(expected, rel=1e-5 if step == first else 1e-4, abs=1e-7), step
    assert len({tuple(values) for values in alone["losses"].values()}) == len(alone["losses"])
    assert_close(spread["gradient"], alone["gradient"])


class RefuseTheFlatter(GroupFilter, Callback):
    """Refuses the groups of an iteration but the one with the widest range: of two ranks, all that one of them has."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.group_filters.append(self)

    def keep(self, iteration_scores: torch.Tensor, weights: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        ranges = {g: torch.aminmax(iteration_scores[groups == g]) for g in groups.tolist()}
        widest = max(ranges, key=lambda group: float(ranges[group].max - ranges[group].min))
        return groups == widest


@pytest.mark.parametrize("stage", ["nft", "clipped"])
@pytest.mark.parametrize("strategy", ["fsdp2", REPLICATED])
def test_a_rank_that_learns_from_nothing_counts_for_nothing(recorded, stage: str, strategy: str) -> None:
    alone = recorded(stage, "single", 1, extra=(RefuseTheFlatter(),))
    spread = recorded(stage, strategy, 2, extra=(RefuseTheFlatter(),))
    for step, expected in alone["losses"].items():
        assert spread["losses"][step] == pytest.approx(expected, rel=1e-4, abs=1e-7), step
    assert_close(spread["gradient"], alone["gradient"])
    unfiltered = recorded(stage, "single", 1)
    assert not torch.allclose(unfiltered["gradient"][0], alone["gradient"][0], rtol=1e-2)


@pytest.mark.parametrize("stage", ["nft", "clipped"])
@pytest.mark.parametrize("strategy", ["fsdp2", REPLICATED])
def test_two_ranks_draw_the_samples_that_one_process_draws(recorded, stage: str, strategy: str) -> None:
    alone, spread = recorded(stage, "single", 1), recorded(stage, strategy, 2)
    first = min(alone["samples"])
    drawn: dict = {}
    for rank in spread["ranks"]:
        assert not drawn.keys() & rank["samples"][first].keys(), "no sample is drawn twice"
        drawn |= rank["samples"][first]
    assert drawn.keys() == alone["samples"][first].keys()
    assert all(torch.equal(drawn[key], latents) for key, latents in alone["samples"][first].items())


@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_holds_half_of_weights_gradients_and_optimizer(recorded, stage: str) -> None:
    alone, spread = recorded(stage, "single", 1), recorded(stage, "fsdp2", 2)
    for kind, total in alone["bytes"].items():
        assert total > 0
        for rank in spread["ranks"]:
            assert rank["bytes"][kind] == pytest.approx(total / 2, rel=0.05), kind
