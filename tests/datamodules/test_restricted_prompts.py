"""Training on some of the prompts: the rest never comes, and a checkpoint knows which they were."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules import EditPairDataModule, PromptDataModule
from datamodules.mixed import MixedTaskDataModule
from datamodules.prompts import data_by_task
from flow_rl.curation.provenance import prompt_digests


@pytest.fixture
def edits(tmp_path: Path) -> EditPairDataModule:
    for number in range(3):
        pixels = np.full((8, 8, 3), 40 * number, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    files = {}
    for split, first in (("train", 0), ("validation", 100), ("test", 200)):
        rows = [
            {"id": first + i, "instruction": f"make it {i}", "source": f"{i % 3}.png", "category": "hair"}
            for i in range(6)
        ]
        path = tmp_path / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[f"{split}_file"] = str(path)
    return EditPairDataModule(image_size=8, prompts_per_step=2, **files)


def ids(module: PromptDataModule, batches: int) -> list[tuple[int, ...]]:
    stream = module.stream(start=0, rank=0, world_size=1)
    return [batch.ids for batch in itertools.islice(stream, batches)]


def test_only_the_kept_prompts_come_whatever_order_they_were_named_in(data) -> None:
    one, other = data(), data()
    one.restrict([9, 3, 4, 7])
    other.restrict((7, 4, 9, 3))
    assert ids(one, 6) == ids(other, 6)
    assert {i for batch in ids(one, 2) for i in batch} == {3, 4, 7, 9}
    assert one.restriction == other.restriction != data().restriction
    assert len(one.validation) == 4


def test_what_cannot_be_restricted_is_refused(data) -> None:
    with pytest.raises(ValueError, match=r"1 of the prompts to keep are not in the training file: 77"):
        data().restrict([1, 2, 77])
    with pytest.raises(ValueError, match=r"1 training prompts are kept, and data.prompts_per_step is 2"):
        data().restrict([1])
    module = data()
    ids(module, 1)
    with pytest.raises(RuntimeError, match="too late"):
        module.restrict([1, 2, 3])
    with pytest.raises(ValueError, match="received NoneType"):
        data_by_task(None)


def test_a_checkpoint_of_other_prompts_is_refused(data) -> None:
    kept = data()
    kept.restrict([1, 2, 3])
    state = {"position": 4, "restriction": kept.restriction}
    for change, fine in (([3, 2, 1], True), ([1, 2, 4], False), (None, False)):
        module = data()
        if change is not None:
            module.restrict(change)
        module.load_state_dict(state)
        if fine:
            assert ids(module, 1)
        else:
            with pytest.raises(ValueError, match="another choice of prompts"):
                ids(module, 1)
    old = data()
    old.load_state_dict({"position": 4})  # of before there were restrictions
    assert ids(old, 1)


def test_tasks_of_a_mixed_run_are_restricted_one_by_one(data, edits) -> None:
    mixed = MixedTaskDataModule(data(), edits)
    parts = data_by_task(mixed)
    assert list(parts) == ["t2i", "edit"]
    parts["edit"].restrict([5, 0])
    assert {i for batch in ids(parts["edit"], 3) for i in batch} == {0, 5}
    assert len(parts["t2i"].train) == 12
    again = MixedTaskDataModule(data(), edits)
    again.load_state_dict({"position": 1, "restrictions": {"t2i": "", "edit": "another"}})
    assert ids(again.tasks[0], 1)
    with pytest.raises(ValueError, match="another choice of prompts"):
        ids(again.tasks[1], 1)


def test_prompts_are_known_by_text_and_source_image(data, edits, tmp_path) -> None:
    before = prompt_digests(edits.train)
    assert len(set(before.tolist())) == 6
    order = [4, 1, 0]
    assert prompt_digests(edits.train.subset(order)).tolist() == before[order].tolist()
    Image.fromarray(np.full((8, 8, 3), 200, dtype=np.uint8)).save(tmp_path / "1.png")
    changed = (prompt_digests(edits.train) != before).nonzero().flatten().tolist()
    assert changed == [1, 4]
    table = data().train
    renamed = type(table)(ids=table.ids, texts=table.texts, categories=("other",) * len(table))
    assert prompt_digests(renamed).tolist() == prompt_digests(table).tolist()
