"""What a run goes on from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from strategies.checkpoint_files import save_file
from strategies.resume import NothingToResumeError, checkpoint_to_resume, mark_start, restarted


def saved(path: Path, when: float) -> str:
    save_file({}, path)
    os.utime(path, (when, when))
    return str(path)


def resumed(given: str | None, directory: Path) -> str | None:
    return checkpoint_to_resume(given, [directory], directory, restarted=restarted())


def test_nothing_is_resumed_unasked(tmp_path) -> None:
    saved(tmp_path / "a.ckpt", 1000)
    assert resumed(None, tmp_path) is None
    assert resumed("given.ckpt", tmp_path) == "given.ckpt"


def test_last_is_the_newest_and_none_is_an_error(tmp_path) -> None:
    with pytest.raises(NothingToResumeError, match=r"no complete checkpoint.*Leave it out"):
        resumed("last", tmp_path)
    saved(tmp_path / "b.ckpt", 1000)
    newest = saved(tmp_path / "a.ckpt", 2000)
    assert resumed("last", tmp_path) == newest


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_restarted_job_goes_on_from_its_own_newest_alone(tmp_path, monkeypatch, variable: str) -> None:
    earlier = saved(tmp_path / "of_an_earlier_job.ckpt", 1000)
    mark_start(tmp_path)
    monkeypatch.setenv(variable, "0")
    assert resumed(None, tmp_path) is None
    monkeypatch.setenv(variable, "1")
    assert resumed(None, tmp_path) is None
    assert resumed("last", tmp_path) == earlier
    own = tmp_path / "own.ckpt"
    save_file({}, own)
    assert resumed(None, tmp_path) == str(own)
    assert resumed(earlier, tmp_path) == str(own)
