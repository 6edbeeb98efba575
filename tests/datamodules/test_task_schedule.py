"""The task of the n-th batch: ratios, stages, and nothing to remember over a resume."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from datamodules import AlternatingTaskDataModule, EditPairDataModule, PromptDataModule
from datamodules.alternating import AlternatingStream
from datamodules.task_schedule import TaskRatios, TaskSchedule


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ratios", [{"t2i": 1, "edit": 1}, {"t2i": 3, "edit": 1}, {"a": 1, "b": 2, "c": 5}])
def test_any_stretch_holds_the_ratios(ratios: dict[str, float], seed: int) -> None:
    schedule = TaskSchedule([TaskRatios(ratios=ratios)], seed=seed)
    for start in (0, 7, 1000):
        found = Counter(schedule.task(start + n) for n in range(200))
        for name, ratio in ratios.items():
            assert found[name] == pytest.approx(200 * ratio / sum(ratios.values()), abs=4)


def test_stages_change_the_ratios_where_they_start() -> None:
    stages = [TaskRatios(ratios={"t2i": 1}), TaskRatios(start=10, ratios={"t2i": 0, "edit": 1})]
    schedule = TaskSchedule(stages)
    assert [schedule.task(n) for n in range(20)] == ["t2i"] * 10 + ["edit"] * 10
    assert schedule.tasks == ("t2i", "edit")
    assert schedule.counts(14) == {"t2i": 10, "edit": 4}


def test_seeds_give_different_orders() -> None:
    orders = {
        tuple(TaskSchedule([TaskRatios(ratios={"t2i": 1, "edit": 1})], seed=s).task(n) for n in range(30))
        for s in range(6)
    }
    assert len(orders) > 1


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "at least one stage"),
        ([TaskRatios(start=3, ratios={"t2i": 1})], "start at 0"),
        ([TaskRatios(ratios={"t2i": 1}), TaskRatios(ratios={"edit": 1})], "ascend"),
        ([TaskRatios(ratios={"t2i": 0})], "at least one of them above 0"),
        ([TaskRatios(ratios={"t2i": -1, "edit": 2})], "non-negative"),
    ],
)
def test_bad_schedules_are_refused(stages: list[TaskRatios], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskSchedule(stages)


@pytest.fixture
def tasks(prompt_files, edit_files) -> dict[str, PromptDataModule]:
    return {
        "t2i": PromptDataModule(**prompt_files, prompts_per_step=4, seed=1),
        "edit": EditPairDataModule(image_size=32, **edit_files, prompts_per_step=2, seed=2),
    }


def described(stream: AlternatingStream, count: int) -> list[tuple[str, tuple[int, ...]]]:
    return [(batch.task, batch.ids) for batch in islice(stream, count)]


def test_every_batch_is_of_one_task_and_each_task_goes_through_its_own_stream(tasks) -> None:
    data = AlternatingTaskDataModule(**tasks, seed=3)
    batches = described(data.train_dataloader().dataset, 12)
    assert [task for task, _ in batches] == [data.task_at(n) for n in range(12)]
    for name, module in tasks.items():
        alone = islice(module.train_dataloader().dataset, 12)
        mine = [ids for task, ids in batches if task == name]
        assert mine == [batch.ids for batch in alone][: len(mine)]


@pytest.mark.parametrize("start", [1, 5, 8])
def test_a_stream_from_the_middle_is_the_rest_of_the_whole(tasks, start: int) -> None:
    schedule = AlternatingTaskDataModule(**tasks, seed=3).schedule
    whole = described(AlternatingStream(tasks, schedule), 12)
    assert described(AlternatingStream(tasks, schedule, start=start), 12 - start) == whole[start:]


def test_two_ranks_share_every_batch(tasks) -> None:
    schedule = AlternatingTaskDataModule(**tasks, seed=3).schedule
    whole = described(AlternatingStream(tasks, schedule), 8)
    ranks = [described(AlternatingStream(tasks, schedule, rank=r, world_size=2), 8) for r in range(2)]
    for (task, ids), (one, first), (other, second) in zip(whole, *ranks, strict=True):
        assert task == one == other
        assert ids == first + second


def test_validation_goes_through_all_tasks(tasks) -> None:
    found = [batch.task for batch in AlternatingTaskDataModule(**tasks).val_dataloader()]
    assert found == ["t2i", "edit"]


def test_misnamed_tasks_are_refused(tasks) -> None:
    with pytest.raises(ValueError, match="Did you mean 'edit'"):
        AlternatingTaskDataModule(**tasks, schedule=[TaskRatios(ratios={"t2i": 1, "edits": 1})])
    with pytest.raises(ValueError, match=r"data\.t2i holds edits"):
        AlternatingTaskDataModule(t2i=tasks["edit"], edit=tasks["edit"])
