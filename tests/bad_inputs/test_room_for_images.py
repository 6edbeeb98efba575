"""Images that callbacks will write count among what a disk must have room for."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks import ImageWriter, SampleGrids
from cli import output_checks
from flow_rl.batches import PromptData
from flow_rl.errors import SettingError


class Prompts(PromptData):
    """Two tasks of 100 prompts each, of two categories, for testing and for validation."""

    def by_task(self) -> dict[str, SimpleNamespace]:
        sized = type("Table", (), {"categories": ("a", "b") * 50, "__len__": lambda self: 100})
        return {task: SimpleNamespace(test=sized(), validation=sized(), eval_batch_size=8) for task in ("t2i", "edit")}


def run_with(callback: object, **changes: object) -> SimpleNamespace:
    given = {
        "callbacks": [callback], "datamodule": Prompts(), "limit_test_batches": 1.0, "limit_predict_batches": 1.0,
        "limit_val_batches": 1.0, "max_steps": 60, "val_check_interval": 10, "loggers": [], "fast_dev_run": False,
        "is_global_zero": True,
    }  # fmt: skip
    return SimpleNamespace(**given | changes)


MODULE = SimpleNamespace(image_size=10, test_members=4, updates_per_step=2)
#: a stage, ImageWriter's members, changes of the trainer, and how many images of 300 bytes it writes
WRITTEN = [
    ("test", None, {}, 800),
    ("predict", 2, {}, 400),
    ("predict", 9, {"limit_predict_batches": 3}, 96),
    ("test", 1, {"limit_test_batches": 0.25}, 50),
    ("fit", None, {}, 0),
]


@pytest.mark.parametrize(("stage", "members", "changes", "images"), WRITTEN)
def test_written_images_count_among_the_outputs(stage, members, changes, images, tmp_path: Path, monkeypatch) -> None:
    trainer = run_with(ImageWriter(str(tmp_path), members), **changes)
    found = output_checks.image_bytes(trainer, MODULE, stage)
    assert found == ({str(tmp_path): images * 300} if images else {})
    if images:
        for free in (images * 300, images * 300 - 1):
            monkeypatch.setattr(output_checks.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
            if free < images * 300:
                with pytest.raises(SettingError, match=re.escape(f"'{tmp_path}'")):
                    output_checks.RoomOnDisk().setup(trainer, MODULE, stage)
            else:
                output_checks.RoomOnDisk().setup(trainer, MODULE, stage)


def test_grids_of_every_validation_count(tmp_path: Path) -> None:
    """60 updates are 30 steps, validated three times: 8 images of each of two categories of two tasks."""
    logger = TensorBoardLogger(tmp_path, name="logs", version="")
    trainer = run_with(SampleGrids(per_category=8), loggers=[logger])
    assert output_checks.image_bytes(trainer, MODULE, "fit") == {str(Path(logger.log_dir)): 3 * 32 * 300}
    assert output_checks.image_bytes(run_with(SampleGrids(8), loggers=[logger], max_steps=-1), MODULE, "fit") == {
        str(Path(logger.log_dir)): 32 * 300
    }
