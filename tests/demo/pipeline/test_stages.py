from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from demo.pipeline.stage_runner import StageRunner
from demo.pipeline.stages import Stage

# Writes how often it ran and from where it went on; with `stop` in the way it leaves a checkpoint and dies.
SCRIPT = """
import pathlib, sys
here = pathlib.Path(sys.argv[1])
with (here / "log").open("a") as log:
    log.write(" ".join(sys.argv[2:]) + "\\n")
(here / "last.ckpt").write_text("state")
if (here / "stop").exists():
    sys.exit(1)
(here / "output").write_text("done")
"""


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "input").write_text("one", encoding="utf-8")
    return Stage(
        name="train",
        arguments=[str(tmp_path / "script.py"), str(tmp_path)],
        inputs=[tmp_path / "input"],
        output=tmp_path / "output",
        checkpoints=tmp_path,
    )


def _runs(tmp_path: Path) -> list[str]:
    return (tmp_path / "log").read_text().splitlines()


def _run(stage: Stage, tmp_path: Path) -> StageRunner:
    runner = StageRunner(tmp_path / "run")
    runner.run([stage])
    return runner


def test_a_done_stage_is_skipped_until_an_input_changes(stage, tmp_path, capsys):
    first = _run(stage, tmp_path)
    again = _run(stage, tmp_path)
    assert len(_runs(tmp_path)) == 1
    assert again.seconds == first.seconds
    assert "done before" in capsys.readouterr().out
    (tmp_path / "input").write_text("two", encoding="utf-8")
    _run(stage, tmp_path)
    assert _runs(tmp_path) == ["", ""]  # anew, not from the checkpoint of other inputs


def test_a_lost_output_is_made_again(stage, tmp_path):
    _run(stage, tmp_path)
    stage.output.unlink()
    _run(stage, tmp_path)
    assert _runs(tmp_path) == ["", ""]


def test_an_interrupted_stage_goes_on_from_its_checkpoint(stage, tmp_path):
    (tmp_path / "stop").touch()
    with pytest.raises(SystemExit, match="status 1"):
        _run(stage, tmp_path)
    (tmp_path / "stop").unlink()
    runner = _run(stage, tmp_path)
    assert _runs(tmp_path) == ["", f"--ckpt_path={tmp_path / 'last.ckpt'}"]
    done = json.loads((tmp_path / "run" / "stages.json").read_text())["train"]
    assert done["done"]
    assert runner.seconds["train"] == done["seconds"]


def test_a_checkpoint_of_other_inputs_or_of_an_older_run_is_not_gone_on_from(stage, tmp_path):
    (tmp_path / "stop").touch()
    with pytest.raises(SystemExit):
        _run(stage, tmp_path)
    (tmp_path / "input").write_text("two", encoding="utf-8")
    with pytest.raises(SystemExit):
        _run(stage, tmp_path)
    os.utime(tmp_path / "last.ckpt", (1, 1))
    with pytest.raises(SystemExit):
        _run(stage, tmp_path)
    assert _runs(tmp_path) == ["", "", ""]


def test_what_a_command_resumes_from_is_kept_for_the_same_inputs_alone(stage, tmp_path):
    parts, final = tmp_path / "parts", tmp_path / "final"
    resuming = replace(stage, checkpoints=None, resumes_from=(parts, final))

    def scratch() -> list[bool]:
        return [(parts / "one").exists(), final.exists()]

    (tmp_path / "stop").touch()
    with pytest.raises(SystemExit):
        _run(resuming, tmp_path)
    parts.mkdir()
    (parts / "one").touch()
    final.touch()
    with pytest.raises(SystemExit):
        _run(resuming, tmp_path)
    assert scratch() == [True, True]
    (tmp_path / "input").write_text("two", encoding="utf-8")
    with pytest.raises(SystemExit):
        _run(resuming, tmp_path)
    assert scratch() == [False, False]


def test_an_end_without_output_is_an_interruption(stage, tmp_path):
    broken = Stage(name="x", arguments=["-c", "pass"], inputs=stage.inputs, output=tmp_path / "nothing")
    with pytest.raises(SystemExit, match="goes on"):
        _run(broken, tmp_path)


def test_a_missing_input_is_named(stage, tmp_path):
    (tmp_path / "input").unlink()
    with pytest.raises(FileNotFoundError, match="'train' reads"):
        _run(stage, tmp_path)
