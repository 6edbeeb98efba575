"""One process, killed at random moments: what its last checkpoint says in the end is what an uninterrupted run's says.

Everything with a state is on: filter (curation included), adaptive category weights, EMA, old policy, optimizer, data.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.dist.dist_runs import Run, fit
from tests.planted import Brightness, Dark
from tests.processes import finish, launch, start

from callbacks import CategoryWeightCalibration, RewardRangeFilter
from flow_rl.rl.weight_adaptation import AdaptationSettings
from strategies.checkpoint_files import newest_checkpoint, sweep

pytestmark = pytest.mark.slow

STEPS = 5
TABLE = {"portrait": {"bright": 0.25, "dark": 0.75}, "default": {"bright": 0.9, "dark": 0.1}}


def run_in(directory: Path, files: dict[str, str], resume: Path | None = None) -> Run:
    scores = str(directory / "curation.safetensors")
    return Run(
        stage="nft",
        files=files,
        directory=str(directory),
        record=str(directory / "record"),
        strategy="single",
        world_size=1,
        steps=STEPS,
        resume=resume and str(resume),
        module={"rewards": {"bright": Brightness(), "dark": Dark()}},
        extra=(
            RewardRangeFilter(threshold=0.0, scores=scores, sample_missing=True, online=True, batch_size=2),
            CategoryWeightCalibration(TABLE, adapt=AdaptationSettings(rate=0.3, smoothing=0.5)),
        ),
    )


def assert_equal(found: Any, expected: Any, where: str = "") -> None:
    """Of checkpoints, but for where they lie."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            if "ModelCheckpoint" not in str(key):
                assert_equal(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_equal(a, b, f"{where}/{i}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found.nan_to_num(), expected.nan_to_num()), where
    elif isinstance(expected, str):
        assert Path(found).name == Path(expected).name, where
    else:
        assert found == expected, where


def last(directory: Path) -> dict[str, Any]:
    return torch.load(directory / "last.ckpt", weights_only=False)


def test_killed_at_a_random_moment(files, tmp_path, repetitions, chance) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    begun = time.monotonic()
    launch(fit, 1, run_in(whole, files))
    seconds = time.monotonic() - begun
    expected = last(whole)
    states = "".join(map(str, expected["callbacks"]))
    assert all(name in states for name in ("RewardRangeFilter", "CategoryWeightCalibration", "WeightEMA"))
    for directory in repetitions:
        ranks = start(fit, 1, run_in(directory, files))
        time.sleep(chance.uniform(0.2, seconds))
        if ranks[0].is_alive():
            os.kill(ranks[0].pid, signal.SIGKILL)
        finish(ranks)
        sweep(directory)
        launch(fit, 1, run_in(directory, files, newest_checkpoint([directory])))
        assert_equal(last(directory), expected)
