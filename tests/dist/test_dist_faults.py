"""Killed, preempted or cut short in the middle of a save: what comes after is what would have come."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from tests.dist.dist_runs import CrashInSave, NotFinite, Run, fit, progress
from tests.processes import PATIENCE, finish, launch, start

from callbacks import Preemption
from callbacks.preemption import EXIT_PREEMPTED
from strategies.checkpoint_files import META, newest_checkpoint, sweep

pytestmark = pytest.mark.dist

#: iterations of a run, each with two updates
STEPS = 5
UPDATES = 2 * STEPS


def lines(run: Run) -> dict[int, list[float]]:
    """Losses by step, from however far the run came."""
    path = Path(progress(run))
    text = path.read_text().splitlines() if path.exists() else []
    return {step: values for step, values in map(json.loads, text)}


def run_in(directory: Path, files: dict[str, str], name: str = "record", **changes) -> Run:
    arguments = {"stage": "nft", "files": files, "directory": str(directory), "steps": STEPS} | changes
    return Run(record=str(directory / name), **arguments)


def assert_goes_on(run: Run, files: dict[str, str], expected: dict) -> int:
    """Restart after a fault; the losses of both parts are those of a run without one. Returns the step gone on from."""
    directory = Path(run.directory)
    sweep(directory)
    newest = newest_checkpoint([directory])
    reached = torch.load(newest / META, weights_only=False)["global_step"] if newest else 0
    second = run_in(directory, files, "second", resume=newest and str(newest))
    launch(fit, 2, second)
    before = {step: values for step, values in lines(run).items() if step <= reached}
    assert before | lines(second) == expected["losses"]
    found = torch.load(second.record, weights_only=False)
    assert all(torch.equal(found["weights"][name], expected["weights"][name]) for name in expected["weights"])
    return reached


@pytest.mark.parametrize(
    ("number", "rank"),
    [
        (signal.SIGKILL, 1),
        *(
            pytest.param(number, rank, marks=pytest.mark.slow)
            for number, rank in ((signal.SIGTERM, 0), (signal.SIGKILL, 0), (signal.SIGTERM, 1), (signal.SIGUSR1, 1))
        ),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_signal_at_a_random_moment(
    recorded, files, repetitions, chance, number: signal.Signals, rank: int
) -> None:
    expected = recorded("nft", "fsdp2", 2, steps=STEPS)
    for directory in repetitions:
        run = run_in(directory, files, extra=(Preemption(),))
        ranks = start(fit, 2, run)
        seconds = _wait_for_a_step(run, ranks)
        time.sleep(seconds * chance.uniform(0, STEPS - 2))
        if ranks[rank].is_alive():
            os.kill(ranks[rank].pid, number)
        codes = finish(ranks)
        ended = UPDATES in lines(run)  # after its last step, whatever became of its ranks
        if number == signal.SIGKILL:
            assert ended or (codes[rank] == -signal.SIGKILL and codes[1 - rank] != 0)
        elif not ended:
            assert codes == [EXIT_PREEMPTED, EXIT_PREEMPTED]
            assert len(list(directory.glob("preempted-step=*.ckpt"))) == 1
        assert_goes_on(run, files, expected)


def _wait_for_a_step(run: Run, ranks: list) -> float:
    """Wait for the first step; returns the seconds of one."""
    deadline = time.monotonic() + 60 * PATIENCE
    while len(lines(run)) < 1:
        assert time.monotonic() < deadline
        assert all(process.is_alive() for process in ranks)
        time.sleep(0.02)
    begun = time.monotonic()
    while len(lines(run)) < 2 and all(process.is_alive() for process in ranks):
        time.sleep(0.02)
    return time.monotonic() - begun


@pytest.mark.parametrize(
    "function",
    [pytest.param("dcp.save", marks=pytest.mark.slow), "write_meta", pytest.param("put_in_place", marks=pytest.mark.slow)],
)
def test_a_crash_inside_a_save(recorded, files, repetitions, chance, function: str) -> None:
    expected = recorded("nft", "fsdp2", 2, steps=STEPS)
    for directory in repetitions:
        step = 2 * chance.randint(2, STEPS - 1)
        run = run_in(directory, files, extra=(CrashInSave(step, function),))
        codes = finish(start(fit, 2, run))
        assert 17 in codes
        assert 0 not in codes
        assert list(directory.glob("*.ckpt.partial"))
        reached = assert_goes_on(run, files, expected)
        # shards and meta of that save were complete, and only its name was missing, in the last case alone
        assert reached == (step if function == "put_in_place" else step - 2)
        assert not list(directory.glob("*.ckpt.partial"))


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_all(files, tmp_path) -> None:
    run = run_in(tmp_path, files, steps=3, extra=(NotFinite(1, (1,)),))
    launch(fit, 2, run)
    ranks = [torch.load(run.record + suffix, weights_only=False) for suffix in ("", ".1")]
    assert [rank["skipped"] for rank in ranks] == [{0: 0, 1: 2, 2: 0}] * 2
    for name, weight in ranks[0]["weights"].items():
        assert torch.equal(weight, ranks[1]["weights"][name])
        assert weight.isfinite().all()


def test_the_run_stops_on_all_ranks_when_nothing_is_finite_any_more(files, tmp_path) -> None:
    run = run_in(tmp_path, files, extra=(NotFinite(0, tuple(range(1, 9))),))
    assert finish(start(fit, 2, run)) == [1, 1]
    assert list(lines(run)) == [2, 4, 6]  # the run ends at the fifth update in a row, the first of the fourth iteration
