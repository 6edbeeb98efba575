"""Files that the ranks read, and the runs that several tests look at."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImage21Pipeline
from tests.toy_vlm import toy_files

from flow_rl.models.tiny.qwen_image_21 import build_transformer

from tests.dist.dist_runs import Run, fit
from tests.processes import launch


@pytest.fixture(scope="session")
def files(
    tiny_pipeline: QwenImage21Pipeline, prompt_files: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    toy = toy_files()
    vlm = {"vlm": toy["model"], "rubric": toy["brightness"], "annotations": toy["train"]}
    generator = tmp_path_factory.mktemp("generator") / "smaller"
    _smaller(tiny_pipeline).save_pretrained(generator)
    return {"generator": str(generator)} | vlm | prompt_files


def _smaller(pipeline: QwenImage21Pipeline) -> QwenImage21Pipeline:
    """The tiny generator with a transformer of two narrow layers: a launch is mostly its start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        transformer = build_transformer(num_layers=2, num_heads=2)
        with torch.no_grad():  # a fresh model's last layer is zero, and its velocity with it
            for weight in (transformer.proj_out.weight, transformer.modulation[1].weight):
                weight.normal_(std=0.1)
    return QwenImage21Pipeline(**pipeline.components | {"transformer": transformer})


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


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """When to kill or crash. A failing test prints the seed that chooses the same moments again."""
    given = request.config.getoption("--chance")
    seed = random.SystemRandom().randrange(10**9) if given is None else given
    print(f"Random moments of this test: replay them with --chance {seed}")
    return random.Random(seed)


@pytest.fixture
def repetitions(tmp_path: Path, pytestconfig: pytest.Config) -> Iterator[Path]:
    """As many as `--kills` says: a new directory for each."""

    def directories() -> Iterator[Path]:
        for number in range(pytestconfig.getoption("--kills")):
            directory = tmp_path / str(number)
            directory.mkdir()
            yield directory

    return directories()
