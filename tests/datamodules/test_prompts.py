"""Prompt files, and an order of data that depends on (seed, position) alone."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from datamodules.captioned_images import CaptionedDataset, CaptionedStream
from datamodules.prompts import PromptDataModule, PromptStream, read_prompts
from datamodules.stream import batch_indices
from flow_rl.batches import Captioned, Prompts

PROMPTS = Prompts(ids=tuple(range(100, 110)), texts=tuple(f"prompt {i}" for i in range(10)), categories=("a", "b") * 5)


def ids(stream: PromptStream, batches: int) -> list[tuple[int, ...]]:
    return [batch.ids for batch in itertools.islice(stream, batches)]


def test_an_epoch_holds_every_prompt_once_and_epochs_differ() -> None:
    batches = ids(PromptStream(PROMPTS, batch_size=5, seed=0), 4)
    first, second = list(batches[0] + batches[1]), list(batches[2] + batches[3])
    assert sorted(first) == sorted(second) == list(PROMPTS.ids)
    assert first != second


def test_starting_later_continues_the_same_stream() -> None:
    whole = ids(PromptStream(PROMPTS, batch_size=4, seed=3), 7)
    assert ids(PromptStream(PROMPTS, batch_size=4, seed=3, start=3), 4) == whole[3:]


def test_a_line_ends_where_json_lines_says(tmp_path) -> None:
    """JSON allows U+2028 and its like inside a string, and many tools write them as they are."""
    texts = ["one\u2028two", "three\u0085four", "five"]
    rows = [{"id": n, "prompt": text, "category": "a"} for n, text in enumerate(texts)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\r\n", encoding="utf-8")
    assert list(read_prompts(path).texts) == texts


def test_ranks_share_a_batch_without_overlap() -> None:
    whole = ids(PromptStream(PROMPTS, batch_size=4, seed=3), 5)
    parts = [ids(PromptStream(PROMPTS, batch_size=4, seed=3, rank=r, world_size=2), 5) for r in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


def test_uneven_ranks_and_too_large_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 3"):
        PromptStream(PROMPTS, batch_size=4, seed=0, world_size=3)
    with pytest.raises(ValueError, match="batch of 11"):
        PromptStream(PROMPTS, batch_size=11, seed=0)


def test_batch_indices_are_a_pure_function() -> None:
    assert batch_indices(10, 3, seed=1, batch=7) == batch_indices(10, 3, seed=1, batch=7)
    assert batch_indices(10, 3, seed=1, batch=7) != batch_indices(10, 3, seed=2, batch=7)


def test_select_parts_and_repeat_keep_prompts_together() -> None:
    twice = PROMPTS.select([3, 1]).repeat_interleave(2)
    assert twice.ids == (103, 103, 101, 101)
    assert twice.texts == ("prompt 3", "prompt 3", "prompt 1", "prompt 1")
    assert twice.categories == ("b", "b", "b", "b")
    assert [part.ids for part in PROMPTS.parts(4)] == [PROMPTS.ids[:4], PROMPTS.ids[4:8], PROMPTS.ids[8:]]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty"),
        (['{"id": 1, "prompt": "x", "category": "a"'], "line 1: not JSON"),
        (["[1]"], "expected an object"),
        (['{"id": 1, "prompt": "x"}'], "no 'category'"),
        (['{"id": "1", "prompt": "x", "category": "a"}'], "'id' must be int"),
        (['{"id": true, "prompt": "x", "category": "a"}'], "'id' must be int"),
        (['{"id": 1, "promt": "x", "category": "a"}'], "Did you mean 'prompt'"),
        (['{"id": 1, "prompt": " ", "category": "a"}'], "id 1 is blank"),
        (['{"id": 1, "prompt": "x", "category": "a"}'] * 2, "line 2: id 1 was used on line 1"),
    ],
)
def test_a_bad_file_ends_in_one_message(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_prompts(str(path))


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match=r"Did you mean '.*train\.jsonl'"):
        read_prompts(str(tmp_path / "trian.jsonl"))


def test_training_and_test_ids_must_differ(prompt_files: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="share 12 ids"):
        PromptDataModule(**(prompt_files | {"test_file": prompt_files["train_file"]}))


def test_a_cut_keeps_the_same_prompts_and_every_category(tmp_path: Path, prompt_files: dict[str, str]) -> None:
    path = tmp_path / "validation.jsonl"
    rows = [{"id": 1000 + i, "prompt": "x", "category": "abcde"[i % 5]} for i in range(100)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    cut = [PromptDataModule(**(prompt_files | {"validation_file": str(path)}), max_validation=30) for _ in range(2)]
    assert cut[0].validation.ids == cut[1].validation.ids
    assert len(cut[0].validation) == 30
    assert set(cut[0].validation.categories) == set("abcde")


def test_training_on_a_few_prompts_takes_no_others(prompt_files: dict[str, str]) -> None:
    data = PromptDataModule(**prompt_files, prompts_per_step=4, max_train=8)
    batches = iter(data.train_dataloader())
    seen = {i for _ in range(6) for i in next(batches).ids}
    assert seen == set(data.train.ids)
    assert len(seen) == 8
    with pytest.raises(ValueError, match=r"has 8 prompts \(data\.max_train\)"):
        PromptDataModule(**prompt_files, prompts_per_step=9, max_train=8)


class Numbered(CaptionedDataset):
    """Image i is grey level i / 100; every third example is an edit."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int):
        image = torch.full((3, 4, 4), index / 100)
        return image, "word " * (1 + index % 4), image if index % 3 == 0 else None


def test_captioned_batches_hold_one_task_and_resume_anywhere() -> None:
    def batches(start: int, count: int) -> list[Captioned]:
        return list(itertools.islice(CaptionedStream(Numbered(), batch_size=4, seed=0, start=start, pool=5), count))

    whole = batches(0, 20)
    for offset, batch in enumerate(batches(7, 13)):
        assert torch.equal(batch.images, whole[7 + offset].images)
    edits = [b for b in whole if b.sources is not None]
    assert edits
    assert len(edits) < len(whole)
    assert all(torch.equal(b.images, b.sources) for b in edits)
    assert sum(len({len(c.split()) for c in b.captions}) for b in whole) / len(whole) < 2.5
