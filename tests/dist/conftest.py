"""Files that the ranks read, and the runs that several tests look at."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_vlm import toy_files

sys.path.insert(0, str(Path(__file__).parent))  # the ranks import the runs by name

from dist_runs import Run, fit
from processes import launch


@pytest.fixture(scope="session")
def files(tiny_path: str, prompt_files: dict[str, str]) -> dict[str, str]:
    toy = toy_files()
    vlm = {"vlm": toy["model"], "rubric": toy["brightness"], "annotations": toy["train"]}
    return {"generator": tiny_path} | vlm | prompt_files


@pytest.fixture(scope="session")
def recorded(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """`recorded(stage, strategy, world_size, **changes)`: the record of a run, made once a session."""
    kept: dict[Any, dict[str, Any]] = {}

    def record(stage: str, strategy: str, world_size: int, **changes: Any) -> dict[str, Any]:
        key = (stage, strategy, world_size, repr(sorted(changes.items())))
        if key not in kept:
            directory = tmp_path_factory.mktemp("run")
            run = Run(
                stage=stage,
                files=files,
                directory=str(directory),
                record=str(directory / "record.pt"),
                strategy=strategy,
                world_size=world_size,
            )
            launch(fit, world_size, replace(run, **changes))
            ranks = [directory / "record.pt", *sorted(directory.glob("record.pt.[0-9]"))]
            kept[key] = torch.load(ranks[0], weights_only=False) | {
                "directory": directory,
                "ranks": [torch.load(path, weights_only=False) for path in ranks],
            }
        return kept[key]

    return record
