"""Runs without a signal: one that would learn nothing stops, one that lost one reward of several says so."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from flow_rl.errors import RunStopped
from flow_rl.rl.iteration import Iteration
from flow_rl.rl.reward_weights import GroupFilter
from flow_rl.rl.silent_rewards import SilentIterations, SilentRewards

NAN = float("nan")


def iteration(
    number: int,
    scores: list[list[float]],
    weights: list[list[float]] | None = None,
    tasks="t2i",
    *,
    groups: list[int] | None = None,
    teaches: bool = True,
) -> Iteration:
    count = len(scores)
    table = torch.tensor(scores)
    return Iteration(
        number=number,
        prompts=(),
        images=(),
        latents=(),
        groups=torch.tensor(groups or [0] * count),
        categories=("plant",) * count,
        tasks=(tasks,) * count if isinstance(tasks, str) else tuple(tasks),
        reward_names=("first", "second"),
        scores=table,
        weights=torch.full_like(table, 0.5) if weights is None else torch.tensor(weights),
        advantages=torch.zeros(count),
        teaches=torch.full((count,), teaches),
    )


def test_no_score_at_all_stops_at_once() -> None:
    with pytest.raises(RunStopped, match="iteration 0: no reward has scored a sample of the task 't2i' so far"):
        SilentRewards(3).check(iteration(0, [[NAN, NAN]]))


def test_scores_without_weight_do_not_count() -> None:
    with pytest.raises(RunStopped):
        SilentRewards(3).check(iteration(0, [[NAN, 4.0]], [[1.0, 0.0]]))


def test_a_task_that_has_scores_does_not_speak_for_another() -> None:
    with pytest.raises(RunStopped, match="task 'edit'"):
        SilentRewards(3).check(iteration(0, [[3.0, 3.0], [NAN, NAN]], tasks=("t2i", "edit")))


def test_scores_may_stay_away_for_a_while() -> None:
    silent = SilentRewards(3)
    silent.check(iteration(0, [[3.0, NAN], [NAN, 2.0]]))
    for number in (1, 2):
        silent.check(iteration(number, [[NAN, NAN]]))
    silent.check(iteration(3, [[NAN, 2.0]]))  # counts anew
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in (4, 5):
            silent.check(iteration(number, [[NAN, NAN]]))
        with pytest.raises(RunStopped, match=r"iteration 6: .* for 3 iterations"):
            silent.check(iteration(6, [[NAN, NAN]]))


def test_one_reward_of_several_is_warned_of_once() -> None:
    silent = SilentRewards(2)
    silent.check(iteration(0, [[3.0, NAN]]))
    with pytest.warns(UserWarning, match="model.rewards.second has scored no sample of the task 't2i' in 2 iterations"):
        silent.check(iteration(1, [[3.0, NAN]]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        silent.check(iteration(2, [[3.0, NAN]]))


class RefuseAll(GroupFilter):
    """Refuses every group."""

    def keep(self, iteration_scores: Tensor, weights: Tensor, groups: Tensor) -> Tensor:
        return torch.zeros(len(groups), dtype=torch.bool)

    def __str__(self) -> str:
        return "MyFilter (threshold 2)"


FLAT = [[3.0, 1.0], [3.0, 1.0], [3.0, 4.5], [3.0, 4.5]]
UNEQUAL = [[3.0, 1.0], [3.5, 1.0], [3.0, 4.5], [3.0, 4.75]]


def silent(number: int, scores: list[list[float]], *, teaches: bool = False) -> Iteration:
    return iteration(number, scores, groups=[0, 0, 1, 1], teaches=teaches)


def test_iterations_that_teach_nothing_stop_the_run_with_the_reward_that_was_constant() -> None:
    watch = SilentIterations(3)
    for number in range(2):
        watch.check(silent(number, FLAT), filters=[], mode="per_reward")
    with pytest.raises(
        RunStopped,
        match=r"iteration 2: the last 3 iterations \(model\.max_silent\) taught nothing\. .*"
        r"'first' gave 3 to every image; 'second' gave 1 to 4\.5, the same within a group.*train\.py curate",
    ):
        watch.check(silent(2, FLAT), filters=[], mode="per_reward")


def test_a_single_sample_that_teaches_counts_anew() -> None:
    watch = SilentIterations(2)
    for number in range(6):
        watch.check(silent(number, UNEQUAL, teaches=number % 2 == 1), filters=[], mode="per_reward")
    assert watch.count == 0


def test_a_filter_that_refuses_everything_is_named_with_the_widest_range() -> None:
    with pytest.raises(
        RunStopped, match=r"MyFilter \(threshold 2\) refused all 2 groups.* in a group was 0\.25\. Lower the threshold"
    ):
        SilentIterations(1).check(silent(0, UNEQUAL), filters=[RefuseAll()], mode="per_reward")
