"""The recipe: what depends on what, what is compared with what, and numbers that must agree between configs."""

from __future__ import annotations

import ast
import re
import shutil
import sys
from functools import cache
from pathlib import Path

import pytest

from cli.config_stack import expand
from demo.pipeline.models import AT_ONE, TEACHERS
from demo.pipeline.recipe import CODE, Plan, stages
from demo.pipeline.stages import Stage
from tests.cli.real_runs import ROOT, whole

#: a file of each room of code, and the stages that must run again once it has changed
EVERYTHING = "every stage"
ROOMS = {
    "train.py": "train.py",
    "cli/app.py": "train.py",
    "callbacks/ema.py": "train.py",
    "datamodules/prompts.py": "train.py",
    "lightning_modules/grpo_policy.py": "train.py",
    "strategies/resume.py": "train.py",
    "flow_rl/rewards/vlm.py": EVERYTHING,
    "demo/scorers/rewards.py": "all but edits",
    "demo/world/render.py": EVERYTHING,
    "demo/annotation/cases.py": "annotations",
    "demo/making/edit_prompts.py": "edits",
    "demo/pipeline/report.py": "none",
}


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)


def whole_plan(directory: Path) -> Plan:
    return Plan(directory=directory, upper_bound=True)


# ----------------------------------------------------------------- what depends on what


@pytest.fixture(scope="module")
def copied(tmp_path_factory) -> Path:
    """The code and configs in a directory of their own, and what stages make, as empty files."""
    there = tmp_path_factory.mktemp("copy")
    for stage in stages(whole_plan(Path("runs"))):
        for path in stage.inputs:
            if path.parts[0] == "runs":
                continue
            target = there / path
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                if (ROOT / path).suffix in (".py", ".yaml"):
                    shutil.copy(ROOT / path, target)
                elif path in CODE or path.parts[0] != "demo" or path.name in ("annotation", "making"):
                    shutil.copytree(ROOT / path, target, ignore=shutil.ignore_patterns("__pycache__"))
                else:  # weights and prompts: what they hold is not looked at here
                    target.mkdir()
        for path in stage.makes or (stage.output,):
            made = there / path
            made.parent.mkdir(parents=True, exist_ok=True)
            made.touch() if path.suffix else made.mkdir(exist_ok=True)
    for split in ("train", "test"):
        (there / "runs" / "edits" / f"{split}.jsonl").touch()
    (there / "demo" / "pipeline").mkdir()
    (there / "demo" / "pipeline" / "report.py").touch()
    return there


@pytest.mark.parametrize(("file", "expected"), ROOMS.items())
def test_editing_a_room_of_code_makes_its_stages_stale(file: str, expected: str, copied: Path, monkeypatch) -> None:
    monkeypatch.chdir(copied)
    made = stages(whole_plan(Path("runs")))
    before = {stage.name: stage.fingerprint() for stage in made}
    text = Path(file).read_text(encoding="utf-8")
    Path(file).write_text(text + "\n# another version\n", encoding="utf-8")
    stale = {stage.name for stage in made if stage.fingerprint() != before[stage.name]}
    Path(file).write_text(text, encoding="utf-8")
    runs = {stage.name for stage in made if stage.arguments[0] == "train.py"}
    known = {
        "train.py": runs,
        "all but edits": runs | {"annotations"},
        EVERYTHING: set(before),
        "annotations": {"annotations"},
        "edits": {"edits"},
        "none": set(),
    }
    assert stale == known[expected]


@cache
def modules_of(path: Path) -> tuple[str, ...]:
    """Modules that a file imports anywhere, also inside of functions."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
    return tuple(found)


@cache
def file_of(module: str) -> Path | None:
    """The project's file of a module, or of the class that a class path names."""
    for parts in (module.split("."), module.split(".")[:-1]):
        place = "/".join(parts)
        for path in (Path(f"{place}.py"), Path(place, "__init__.py")):
            if parts and path.is_file():
                return path
    return None


def code_of(stage: Stage) -> set[Path]:
    """Every file of the project that a stage's command may import, by following imports from what it names."""
    if stage.arguments[0] == "-m":
        waiting = [stage.arguments[1]]
    else:
        files = [a.removeprefix("--config=") for a in expand(stage.arguments) if a.startswith("--config=")]
        texts = [Path(file).read_text(encoding="utf-8") for file in files]
        waiting = ["train", *(name for text in texts for name in re.findall(r"class_path: ([\w.]+)", text))]
    seen: set[Path] = set()
    while waiting:
        path = file_of(waiting.pop())
        if path is not None and path not in seen:
            seen.add(path)
            waiting += modules_of(path)
    return seen


def test_every_file_that_a_stage_may_import_is_one_of_its_inputs(tmp_path) -> None:
    """Whatever a stage imports, an edit of it must make the stage run again."""
    for stage in stages(whole_plan(tmp_path)):
        files = [path for path in code_of(stage) if path.read_text(encoding="utf-8").strip()]
        missing = [path for path in files if not any(i == path or i in path.parents for i in stage.inputs)]
        assert missing == [], stage.name


def test_every_config_that_a_stage_reads_is_one_of_its_inputs(tmp_path) -> None:
    for stage in stages(whole_plan(tmp_path)):
        files = [Path(a.removeprefix("--config=")) for a in expand(stage.arguments) if a.startswith("--config=")]
        assert all(any(i == file or i in file.parents for i in stage.inputs) for file in files), stage.name


def test_every_input_is_shipped_or_made_by_an_earlier_stage(tmp_path) -> None:
    made: list[Stage] = []
    for stage in stages(Plan(directory=tmp_path, quick=True, upper_bound=True)):
        for path in stage.inputs:
            if tmp_path not in path.parents:
                assert path.exists(), (stage.name, path)
                continue
            reader = Stage(name="reader", arguments=[], inputs=[path], output=tmp_path / "x")
            assert any(reader.reads(other) for other in made), (stage.name, path)
        made.append(stage)
    assert len({stage.name for stage in made}) == len(made)


def test_a_teacher_waits_for_its_own_curation_alone(tmp_path) -> None:
    found = {stage.name: stage for stage in stages(Plan(directory=tmp_path))}
    assert found["t2i_teacher"].reads(found["curation_t2i_teacher"])
    assert not found["t2i_teacher"].reads(found["curation_edit_teacher"])
    assert all(found["mix_rl"].reads(found[f"curation_{teacher}"]) for teacher in TEACHERS.values())
    assert found["curation_t2i_teacher"].reads(found["reward"])


# ----------------------------------------------------------------- what is run


def test_the_short_selection_needs_no_reward_model(tmp_path) -> None:
    plan = Plan(directory=tmp_path, selection="t2i")
    names = ["t2i_teacher_verifier", "test_t2i_base", "test_t2i_base_guided", "test_t2i_t2i_teacher_verifier"]
    assert [stage.name for stage in stages(plan)] == names
    assert all(stage.command.startswith("python train.py") for stage in stages(plan))
    assert all(plan.reward_model not in stage.inputs for stage in stages(plan))
    assert sys.executable not in stages(plan)[0].command
    with pytest.raises(ValueError, match="'everything'"):
        Plan(directory=tmp_path, selection="everything")


def test_teachers_and_mix_rl_learn_from_the_reward_model_on_curated_prompts(tmp_path) -> None:
    plan = Plan(directory=tmp_path)
    found = {stage.name: stage for stage in stages(plan)}
    for name in (*TEACHERS.values(), "mix_rl"):
        assert plan.reward_model in found[name].inputs
        assert not any("verifier" in argument for argument in found[name].arguments)
    for teacher in TEACHERS.values():
        assert set(found[f"curation_{teacher}"].makes) <= set(found[teacher].inputs)
        assert "--config=configs/demo/curated.yaml" in found[teacher].arguments


def test_the_upper_bound_is_left_out_unless_it_is_asked_for(tmp_path) -> None:
    plain, more = ({s.name for s in stages(Plan(directory=tmp_path, upper_bound=u))} for u in (False, True))
    assert plain < more
    assert {"edit_teacher_verifier", "curation_t2i_teacher_verifier", "test_t2i_t2i_teacher_verifier"} <= more - plain
    assert all("verifier" in name for name in more - plain)


def test_rows_are_drawn_as_they_are_named(tmp_path) -> None:
    plan = whole_plan(tmp_path)
    found = {stage.name: stage.arguments for stage in stages(plan)}
    for row in plan.rows:
        for task in row.tasks:
            unguided = "--config=configs/guidance/none.yaml" in found[f"test_{task}_{row.name}"]
            assert unguided is (row.name in ("base", "student") or row.name.endswith(AT_ONE))
    assert plan.models[0] == "base"
    assert plan.models[-1] == "student"


# ----------------------------------------------------------------- numbers that must agree


def test_mix_rl_has_as_many_updates_and_images_of_each_task_as_both_teachers() -> None:
    teachers = {task: whole(f"configs/demo/{name}.yaml") for task, name in TEACHERS.items()}
    mixed = whole("configs/demo/mix_rl.yaml")
    steps = mixed["trainer"]["max_steps"]
    assert steps == sum(teacher["trainer"]["max_steps"] for teacher in teachers.values())
    for task, teacher in teachers.items():
        own = teacher["trainer"]["max_steps"] * teacher["data"]["init_args"]["prompts_per_step"]
        assert steps * mixed["data"]["init_args"][task]["init_args"]["prompts_per_step"] == own
    for key in ("rewards", "reward_weights", "rollout", "objective", "advantages", "optimizer"):
        settings = [config["model"]["init_args"][key] for config in (mixed, *teachers.values())]
        assert settings[0] == settings[1] == settings[2], key


def test_the_student_imitates_its_teachers_at_the_guidance_of_their_rollouts() -> None:
    rollout = whole("configs/demo/t2i_teacher.yaml")["model"]["init_args"]["rollout"]
    teachers = whole("configs/demo/student.yaml")["model"]["init_args"]["teachers"]
    assert rollout["cfg"] == "rollout_only"
    assert teachers["t2i"]["guidance"] == rollout["guidance"]
    assert teachers["edit"]["guidance"] == rollout["guidance"]


@pytest.mark.parametrize("config", ["curated", "mix_rl_curated"])
def test_filters_keep_by_the_threshold_that_curation_reports(config: str) -> None:
    kept = whole(f"configs/demo/{config}.yaml")["callbacks"]["prompt_filter"]["init_args"]["threshold"]
    assert kept == whole("configs/demo/curate.yaml")["curation"]["threshold"]
