"""Edit files: contract, order, and images that are checked at the start and read when they are due."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import EditPairDataModule
from datamodules.edit_pairs import read_edits
from flow_rl.errors import RunStopped


def write(directory: Path, name: str, rows: list[dict]) -> str:
    path = directory / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Edit files whose source number i is uniformly of grey level i."""
    (tmp_path / "images").mkdir()
    made, first = {}, 0
    for split, count in (("train", 8), ("validation", 4), ("test", 4)):
        rows = []
        for i in range(first, first + count):
            Image.fromarray(np.full((16, 16, 3), i, dtype=np.uint8)).save(tmp_path / f"images/{i}.png")
            rows.append({"id": i, "instruction": f"do {i}", "source": f"images/{i}.png", "category": "portrait"})
        made[f"{split}_file"] = write(tmp_path, f"{split}.jsonl", rows)
        first += count
    return made


def test_every_instruction_comes_with_its_own_source(files: dict[str, str]) -> None:
    data = EditPairDataModule(**files, image_size=16, prompts_per_step=4, seed=3)
    batch = next(iter(data.train_dataloader()))
    assert len(batch) == 4
    assert batch.texts == tuple(f"do {i}" for i in batch.ids)
    assert (batch.sources * 255).round().to(int).amax((1, 2, 3)).tolist() == list(batch.ids)


def test_sources_are_scaled_to_the_model(files: dict[str, str]) -> None:
    batch = next(iter(EditPairDataModule(**files, image_size=32).test_dataloader()))
    assert batch.sources.shape == (4, 3, 32, 32)
    assert batch.sources.dtype == torch.float32


def test_fixed_batches_cover_every_edit_once(files: dict[str, str]) -> None:
    data = EditPairDataModule(**files, image_size=16, eval_batch_size=3, max_test=4)
    seen = [i for batch in data.test_dataloader() for i in batch.ids]
    assert seen == [12, 13, 14, 15]


@pytest.mark.parametrize("change", ["vanishes", "is cut off", "is replaced"])
def test_a_source_that_changes_later_is_named_with_its_row(files: dict[str, str], tmp_path: Path, change: str) -> None:
    data = EditPairDataModule(**files, image_size=16, prompts_per_step=8)
    path = tmp_path / "images/0.png"
    if change == "vanishes":
        path.unlink()
    elif change == "is cut off":
        path.write_bytes(path.read_bytes()[:40])
    else:
        Image.new("RGB", (16, 24)).save(path)
    with pytest.raises(RunStopped, match=r"train\.jsonl, line 1: source: .*0\.png'.* when the run started"):
        next(iter(data.train_dataloader()))


def test_a_source_that_is_not_square_is_refused(files: dict[str, str], tmp_path: Path) -> None:
    Image.new("RGB", (16, 24)).save(tmp_path / "images/0.png")
    with pytest.raises(ValueError, match=r"train\.jsonl, line 1: source: .*16 x 24; sources must be square"):
        EditPairDataModule(**files, image_size=16, prompts_per_step=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "images/99.png"}, r"line 1: source 'images/99\.png' is not there \(paths are relative"),
        ({"target": "images/98.png"}, r"target 'images/98\.png' is not there"),
        ({"instruction": " "}, "the instruction with id 0 is blank"),
        ({"instructions": "x"}, "unknown key 'instructions'. Did you mean 'instruction'"),
        ({"source": 3}, "'source' must be str"),
    ],
)
def test_bad_rows_are_named(files: dict[str, str], tmp_path: Path, change: dict, message: str) -> None:
    row = {"id": 0, "instruction": "do", "source": "images/0.png", "category": "portrait"}
    with pytest.raises(ValueError, match=message):
        read_edits(write(tmp_path, "bad.jsonl", [row | change]), 16)
