"""Rollouts get their advantages as soon as they can, and the same ones as all at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from flow_rl.batches import Prompts
from flow_rl.distributed.shares import gather_ranks
from flow_rl.flow.advantages import group_advantages
from flow_rl.rl.advantage_estimator import AdvantageEstimator, Outcome
from flow_rl.rl.objectives import Rollout
from flow_rl.rl.reward_weights import FixedWeights, GroupFilter, weights_by_task
from flow_rl.rl.settings import AdvantageSettings
from tests.processes import launch
from tests.toy_policy import toy_rollout

NAMES = ("a", "b")
WEIGHTS = {"t2i": {"a": 0.75, "b": 0.25}, "edit": {"b": 1.0}}
Scored = Iterator[tuple[Rollout, Tensor]]


def rolled_out(first: int, *, edit: bool = False) -> Rollout:
    """One prompt with a group of three."""
    sources = torch.zeros(1, 3, 2, 2) if edit else None
    return toy_rollout(Prompts(ids=(first,), texts=("x",), categories=("c",), sources=sources), 3)


SCORES = torch.tensor([[1.0, 2], [3, 2], [2, 5], [4, 1], [4, 3], [1, float("nan")]])


def scored(asked: list[int]) -> Scored:
    """Two rollouts with their scores, and a note of when each was waited for."""
    for identifier, scores in ((7, SCORES[:3]), (8, SCORES[3:])):
        asked.append(identifier)
        yield rolled_out(identifier), scores


def estimate(
    settings: AdvantageSettings, given: Iterable[tuple[Rollout, Tensor]], filters: Sequence[GroupFilter] = ()
) -> Iterator[Outcome]:
    estimator = AdvantageEstimator(
        settings, clip=5.0, reward_names=NAMES, weight_source=FixedWeights(WEIGHTS), filters=filters
    )
    return (outcome for _, outcome in estimator.estimate(given))


def joined(outcomes: list[Outcome]) -> Tensor:
    return torch.cat([outcome.advantages for outcome in outcomes])


def expected(**changes) -> Tensor:
    groups = torch.tensor([14] * 3 + [16] * 3)
    weights = torch.tensor([0.75, 0.25]).expand(6, 2)
    return group_advantages(SCORES, groups, weights, std_floor=0.1, clip=5.0, **changes)


def test_a_rollout_does_not_wait_for_the_next_ones_scores() -> None:
    asked: list[int] = []
    turn = estimate(AdvantageSettings(), scored(asked))
    outcomes = [next(turn)]
    assert asked == [7]
    outcomes.append(next(turn))
    torch.testing.assert_close(joined(outcomes), expected())


@pytest.mark.parametrize(
    "changes", [{"mode": "sum"}, {"batch_normalise": True}, {"mode": "sum", "batch_normalise": True}]
)
def test_switches_reach_the_advantages(changes: dict) -> None:
    asked: list[int] = []
    turn = estimate(AdvantageSettings(**changes), scored(asked))
    outcomes = [next(turn)]
    assert asked == ([7, 8] if "batch_normalise" in changes else [7])  # what looks beyond a group waits for all
    outcomes += turn
    torch.testing.assert_close(joined(outcomes), expected(**changes))
    assert not torch.allclose(joined(outcomes), expected())


class Refuse(GroupFilter):
    """Refuses one group and keeps what it was shown."""

    def __init__(self, group: int) -> None:
        self.group = group

    def keep(self, iteration_scores: Tensor, weights: Tensor, groups: Tensor) -> Tensor:
        self.seen = iteration_scores, weights, groups
        return groups != self.group


def test_a_refused_group_has_no_advantage_and_the_others_keep_theirs() -> None:
    refuse = Refuse(16)
    outcomes = list(estimate(AdvantageSettings(), scored([]), [refuse]))
    assert torch.equal(outcomes[1].advantages, torch.zeros(3))
    torch.testing.assert_close(outcomes[0].advantages, expected()[:3])
    assert [outcome.teaches.tolist() for outcome in outcomes] == [[True] * 3, [False] * 3]
    assert [len(values) for values in refuse.seen] == [6, 6, 6]
    assert refuse.seen[2].tolist() == [14] * 3 + [16] * 3


@pytest.mark.parametrize("batch_normalise", [False, True])
def test_flat_groups_and_unscored_samples_teach_nothing(batch_normalise: bool) -> None:
    nan = float("nan")
    given = [
        (rolled_out(7), torch.tensor([[3.0, 2], [3, 2], [3, 2]])),
        (rolled_out(8), torch.tensor([[1.0, 2], [2, 2], [3, 2]])),
        (rolled_out(9), torch.tensor([[nan, nan], [4, 2], [3, 2]])),
    ]
    outcomes = list(estimate(AdvantageSettings(batch_normalise=batch_normalise), given))
    assert [outcome.teaches.tolist() for outcome in outcomes] == [[False] * 3, [True] * 3, [False, True, True]]
    assert float(outcomes[1].advantages[1]) == pytest.approx(0.0, abs=1e-6)  # in the middle of its group, and counts


def test_an_edit_with_the_id_of_a_prompt_is_another_group() -> None:
    nan = float("nan")
    edit = rolled_out(7, edit=True), torch.tensor([[nan, 1.0], [nan, 1], [nan, 4]])
    outcomes = list(estimate(AdvantageSettings(), [*scored([]), edit], [Refuse(-1)]))
    assert outcomes[2].groups.tolist() == [15] * 3
    assert outcomes[2].weights.tolist() == [[0.0, 1.0]] * 3
    values = torch.tensor([1.0, 1, 4])
    torch.testing.assert_close(outcomes[2].advantages, (values - 2) / values.std(correction=0))
    torch.testing.assert_close(joined(outcomes[:2]), expected())


def _rank(directory: Path) -> None:
    rank, store = int(os.environ["LOCAL_RANK"]), dist.FileStore(str(directory / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    outcomes = list(estimate(AdvantageSettings(batch_normalise=True), [list(scored([]))[rank]]))
    large = gather_ranks(torch.tensor([2**53 + 1 + rank]))
    torch.save((outcomes[0].advantages, large), directory / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_normalise_over_both(tmp_path: Path) -> None:
    launch(_rank, 2, tmp_path)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    whole = torch.cat([advantages for advantages, _ in found])
    torch.testing.assert_close(whole, expected(batch_normalise=True))
    assert found[0][1].tolist() == [2**53 + 1, 2**53 + 2]  # ids beyond what a float can tell apart


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 0.5}, "has no entry for b"),
        ({"a": 0.5, "bb": 0.5}, "names 'bb'; the rewards are a, b. Did you mean 'b'"),
        ({"a": 0.5, "b": 0.6}, "sums to 1.1"),
        ({"a": -0.5, "b": 1.5}, "must be non-negative"),
        ({"t2i": {"a": 1.0}}, "names b for no task"),
        ({"t2i": {"a": 1.0}, "edits": {"b": 1.0}}, "names 'edits'; the tasks are t2i, edit. Did you mean 'edit'"),
        ({"t2i": {"a": 1.0}, "b": 0.5}, r"mixes weights by task \('t2i'\) with one for all \('b'\)"),
        ({"t2i": {"a": 0.5}, "edit": {"b": 1.0}}, "model.reward_weights.t2i must be non-negative and sum to 1"),
        ({"t2i": {}, "edit": {"a": 0.5, "b": 0.5}}, "model.reward_weights.t2i must be"),
    ],
)
def test_bad_weights_are_refused(weights: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weights_by_task(NAMES, weights)


def test_weights_without_tasks_hold_for_both() -> None:
    assert weights_by_task(NAMES, None) == {"t2i": {"a": 0.5, "b": 0.5}, "edit": {"a": 0.5, "b": 0.5}}
    table: Callable[..., Tensor] = FixedWeights(weights_by_task(NAMES, WEIGHTS)).weights
    assert table(["c", "c"], ["edit", "t2i"], NAMES).tolist() == [[0.0, 1.0], [0.75, 0.25]]


def test_a_task_without_weights_is_named() -> None:
    source = FixedWeights(weights_by_task(NAMES, {"t2i": {"a": 0.5, "b": 0.5}}))
    with pytest.raises(ValueError, match=r"hold 'edit' samples, but model\.reward_weights is for t2i alone"):
        source.weights(["c"], ["edit"], NAMES)
