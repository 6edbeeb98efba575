"""Prompts and edits side by side: one order, any start, any number of ranks."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from datamodules import MixedTaskDataModule
from flow_rl.batches import Prompts, TaskBatches, labels

Ids = tuple[tuple[int, ...], ...]


def drawn(data: MixedTaskDataModule, count: int) -> list[Ids]:
    return [tuple(part.ids for part in batch.parts) for batch in itertools.islice(data.train_dataloader(), count)]


def test_every_iteration_holds_both_tasks_apart(mixed: MixedTaskDataModule) -> None:
    batch = next(iter(mixed.train_dataloader()))
    assert isinstance(batch, TaskBatches)
    assert [part.task for part in batch.parts] == ["t2i", "edit"]
    assert [len(part) for part in batch.parts] == [2, 1]
    assert len(batch) == 3
    assert batch.parts[1].sources.shape == (1, 3, 32, 32)


def test_each_task_keeps_its_own_order(mixed, data, edits) -> None:
    """What a task sees does not depend on the other: it is what it would see alone."""
    alone = [
        [batch.ids for batch in itertools.islice(module.train_dataloader(), 14)]
        for module in (data(), edits(prompts_per_step=1, seed=5))
    ]
    assert drawn(mixed, 14) == list(zip(*alone, strict=True))


def test_a_later_start_continues_both_streams(mixed: MixedTaskDataModule) -> None:
    whole = drawn(mixed, 9)
    mixed.load_state_dict({"position": 4})
    assert drawn(mixed, 5) == whole[4:]


def test_ranks_share_both_tasks_evenly(data, edits) -> None:
    def make(rank: int, world_size: int) -> MixedTaskDataModule:
        module = MixedTaskDataModule(data(prompts_per_step=4), edits(prompts_per_step=2))
        module.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
        return module

    whole = drawn(make(0, 1), 5)
    first, second = (drawn(make(rank, 2), 5) for rank in range(2))
    for batch, one, two in zip(whole, first, second, strict=True):
        assert [len(ids) for ids in one] == [2, 1]
        assert tuple(a + b for a, b in zip(one, two, strict=True)) == batch
    with pytest.raises(ValueError, match=r"data\.prompts_per_step is 2, which 4 ranks cannot share"):
        make(0, 4).train_dataloader()


def test_validation_and_test_cover_both_tasks(mixed: MixedTaskDataModule) -> None:
    for loader in (mixed.val_dataloader(), mixed.test_dataloader(), mixed.predict_dataloader()):
        batches = list(loader)
        assert [batch.task for batch in batches] == ["t2i", "edit"]
        assert batches[0].ids == batches[1].ids  # the files use the same ids
        assert not set(batches[0].groups.tolist()) & set(batches[1].groups.tolist())


def test_edits_in_the_place_of_prompts_are_refused(edits) -> None:
    with pytest.raises(ValueError, match=r"data\.t2i holds edits"):
        MixedTaskDataModule(edits(), edits())


def test_groups_are_stable_integers_beyond_what_a_float_holds() -> None:
    ids = (2**53, 2**53 + 1, 0)
    prompts = Prompts(ids=ids, texts=("x",) * 3, categories=("c",) * 3)
    edited = Prompts(ids=ids, texts=("x",) * 3, categories=("c",) * 3, sources=torch.zeros(3, 3, 2, 2))
    assert prompts.groups.dtype == torch.int64
    assert len({*prompts.groups.tolist(), *edited.groups.tolist()}) == 6
    assert prompts.select([2, 0]).groups.tolist() == [prompts.groups[2], prompts.groups[0]]


def test_labels_tell_categories_of_one_name_apart() -> None:
    assert labels(["portrait", "portrait"], ["t2i", "edit"]) == ["portrait", "edit/portrait"]
