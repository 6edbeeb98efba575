"""Stages side by side: who waits for whom, and what happens to the others when one fails."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from demo.pipeline.stage_progress import ending, last_line
from demo.pipeline.stage_runner import StageRunner
from demo.pipeline.stages import Stage

# Says that it is there, waits for another to say so, then makes its output from what it reads.
MEET = """
import pathlib, sys, time
here, me, other = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
(here / f"{me}.here").touch()
until = time.monotonic() + 60
while not (here / f"{other}.here").exists():
    assert time.monotonic() < until, f"{other} never came"
    time.sleep(0.02)
(here / f"{me}.out").write_text(me)
"""
FAIL = """
import pathlib, sys, time
here = pathlib.Path(sys.argv[1])
while not (here / "long.here").exists():
    time.sleep(0.02)
print("something is wrong here")
sys.exit(3)
"""
COPY = """
import pathlib, sys
here = pathlib.Path(sys.argv[1])
(here / "second.out").write_text((here / "first" / "first.out").read_text())
"""
TELL = """
import os, pathlib, sys
pathlib.Path(sys.argv[1], "tell.out").write_text(os.environ.get("OMP_NUM_THREADS", "free"))
"""
LONG = """
import pathlib, signal, sys, time
here = pathlib.Path(sys.argv[1])
def stop(*_):
    (here / "long.stopped").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
(here / "long.here").touch()
time.sleep(120)
"""


def _stage(here: Path, name: str, script: str, *arguments: str, reads: tuple[str, ...] = ()) -> Stage:
    path = here / f"{name}.py"
    path.write_text(script, encoding="utf-8")
    folder = here / name
    return Stage(
        name=name,
        arguments=[str(path), str(here), *arguments],
        inputs=[here / read for read in reads],
        output=folder.with_suffix(".out"),
    )


def test_independent_stages_run_at_the_same_time(tmp_path) -> None:
    left, right = _stage(tmp_path, "left", MEET, "left", "right"), _stage(tmp_path, "right", MEET, "right", "left")
    runner = StageRunner(tmp_path / "run", jobs=2)
    runner.run([left, right])  # one by one, each would wait for the other in vain
    assert set(runner.seconds) == {"left", "right"}


def test_a_stage_waits_for_what_it_reads_and_lets_others_pass(tmp_path) -> None:
    (tmp_path / "first").mkdir()
    first = Stage(
        name="first",
        arguments=["-c", MEET.replace("{me}.out", "first/{me}.out"), str(tmp_path), "first", "third"],
        inputs=[],
        output=tmp_path / "first" / "first.out",
    )
    second = _stage(tmp_path, "second", COPY, reads=("first",))
    third = _stage(tmp_path, "third", MEET, "third", "first")
    assert second.reads(first)
    assert not third.reads(first)
    assert not first.reads(second)
    StageRunner(tmp_path / "run", jobs=2).run([first, second, third])
    assert (tmp_path / "second.out").read_text() == "first"


def test_a_failed_stage_ends_the_others(tmp_path, capfd) -> None:
    stages = [_stage(tmp_path, "long", LONG), _stage(tmp_path, "bad", FAIL)]
    with pytest.raises(SystemExit, match=r"'bad' ended with status 3.*bad\.log"):
        StageRunner(tmp_path / "run", jobs=2).run(stages)
    assert (tmp_path / "long.stopped").exists()
    assert "something is wrong here" in capfd.readouterr().out


def test_a_directory_belongs_to_one_run(tmp_path) -> None:
    (tmp_path / "stages.lock").touch()
    with (tmp_path / "stages.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="is at work in"):
            StageRunner(tmp_path).run([])
    StageRunner(tmp_path).run([])


def test_stages_share_the_threads(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    for jobs, wanted in ((1, "free"), (2, "4"), (16, "1")):
        StageRunner(tmp_path / f"run{jobs}", jobs=jobs).run([_stage(tmp_path, "tell", TELL)])
        assert (tmp_path / "tell.out").read_text() == wanted
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "3")
    StageRunner(tmp_path / "own", jobs=2).run([_stage(tmp_path, "tell", TELL)])
    assert (tmp_path / "tell.out").read_text() == "3"


def test_of_a_progress_bar_the_last_state_is_shown(tmp_path) -> None:
    log = tmp_path / "log"
    assert last_line(log) == "starts"
    log.write_bytes(b"loads\n\r 10%|x  | 1/10\r\x1b[A 20%|xx | 2/10\r\n")
    assert last_line(log) == "20%|xx | 2/10"
    log.write_text("a\rb\rc\nError: no such file\n", encoding="utf-8")
    assert ending(log) == "c\nError: no such file"
    assert ending(log, count=1) == "Error: no such file"
