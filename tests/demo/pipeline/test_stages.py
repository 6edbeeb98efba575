from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from demo.pipeline.recipe import Plan, stages
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


def test_an_end_without_output_is_an_interruption(stage, tmp_path):
    broken = Stage(name="x", arguments=["-c", "pass"], inputs=stage.inputs, output=tmp_path / "nothing")
    with pytest.raises(SystemExit, match="goes on"):
        _run(broken, tmp_path)


def test_a_stage_whose_need_is_missing_is_left_out(stage, tmp_path):
    needy = Stage(name="x", arguments=stage.arguments, inputs=[], output=stage.output, needs=tmp_path / "vlm")
    assert _run(needy, tmp_path).left_out == {"x": f"'{tmp_path / 'vlm'}' is not there"}
    assert not (tmp_path / "log").exists()


def test_a_missing_input_is_named(stage, tmp_path):
    (tmp_path / "input").unlink()
    with pytest.raises(FileNotFoundError, match="'train' reads"):
        _run(stage, tmp_path)


def test_every_input_is_shipped_or_made_by_an_earlier_stage(tmp_path):
    plan = Plan(directory=tmp_path, selection="all", quick=True)
    made: list[Path] = []
    for stage in stages(plan):
        for path in stage.inputs:
            if tmp_path in path.parents:
                folders = [output if output.suffix == "" else output.parent for output in made]
                assert any(path == f or f in path.parents for f in folders), (stage.name, path)
        made.append(stage.output)
    assert len({stage.name for stage in stages(plan)}) == len(stages(plan))


def test_the_short_selection_trains_one_teacher_and_tests_two_models(tmp_path):
    plan = Plan(directory=tmp_path, selection="t2i")
    assert [s.name for s in stages(plan)] == ["t2i_teacher", "test_t2i_base", "test_t2i_t2i_teacher"]
    assert all(s.command.startswith("python train.py") for s in stages(plan))
    assert sys.executable not in stages(plan)[0].command
    with pytest.raises(ValueError, match="'everything'"):
        Plan(directory=tmp_path, selection="everything")


def test_the_whole_recipe_trains_on_the_curated_prompts(tmp_path):
    found = {stage.name: stage for stage in stages(Plan(directory=tmp_path))}
    assert found["curation"].output in found["t2i_teacher"].inputs
    assert "--config=configs/filter/offline.yaml" in found["t2i_teacher"].arguments
