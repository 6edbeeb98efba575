"""Native guidance, steps and sizes of the released models: against diffusers' own defaults, and in the doctor."""

from __future__ import annotations

import inspect
import json
import shutil
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch

from cli import app
from flow_rl.distillation.settings import DistillationSettings, TeacherSettings
from flow_rl.flow.guidance import Guidance
from flow_rl.models.loading import CARDS, check_model_path, known_models, peek_grid
from flow_rl.models.native import native_sampling
from flow_rl.planning.native import describe, problems_of_guidance
from flow_rl.planning.setup import Setup
from flow_rl.rl.settings import RolloutSettings
from lightning_modules import DistillationStudent
from tests.cli.real_runs import ROOT, whole, write_data, written
from tests.toy_policy import toy_policy

V21, V1 = "Qwen/Qwen-Image-2.1", "Qwen/Qwen-Image"


def rollout(path: str, scale: float, *, num_steps: int = 40, size: int = 1024, **guidance: object) -> Setup:
    settings = RolloutSettings(
        guidance=Guidance(scale=scale, **guidance), num_steps=num_steps, cfg="none" if scale == 1 else "rollout_only"
    )
    return Setup(model=toy_policy(path, image_size=size, rollout=vars(settings)), data=None, trainer={})


def notes(made: Setup) -> list[str]:
    return [line.strip() for line in describe(made) if "note:" in line]


@pytest.mark.parametrize("name", known_models())
def test_cards_repeat_the_defaults_of_diffusers_pipelines(name: str) -> None:
    native, pipeline = native_sampling(name), getattr(diffusers, check_model_path(name))
    defaults = {n: p.default for n, p in inspect.signature(pipeline.__call__).parameters.items()}
    assert native.model == name
    assert native.guidance == defaults["true_cfg_scale"]
    assert defaults["num_inference_steps"] in native.num_steps
    assert native.default_size == (defaults.get("output_resolution", 1024),) * 2
    source = inspect.getsource(pipeline.__call__)
    assert native.rescale is ("cond_norm / noise_norm" in source)


@pytest.mark.parametrize("name", known_models())
def test_native_sizes_can_be_made(name: str) -> None:
    native = native_sampling(name)
    for width, height in (native.default_size, *native.sizes):
        rows, columns = peek_grid(name, (height, width))
        assert rows / columns == height / width


def test_the_seven_sizes_of_qwen_image_21() -> None:
    native = native_sampling(V21)
    assert native.squares == (1024, 2048)
    assert len(native.sizes) == 7
    assert max(native.sizes) == (2752, 1536)
    assert {(height, width) for width, height in native.sizes} == set(native.sizes)


def test_a_checkpoint_is_recognised_by_its_dimensions(tiny_path: str, tmp_path: Path) -> None:
    assert native_sampling(tiny_path) is None  # of the same family as 2.1, and a guided model of its own
    assert describe(rollout(tiny_path, 2.5)) == []
    export = tmp_path / "export"
    shutil.copytree(CARDS / V21, export)
    assert native_sampling(export) == native_sampling(V21)
    index = json.loads((export / "model_index.json").read_text(encoding="utf-8"))
    (export / "model_index.json").write_text(json.dumps(index | {"sample_sigmas": [1.0, 0.8, 0.5, 0.2]}))
    assert native_sampling(export).num_steps == (4,)
    config = json.loads((export / "transformer" / "config.json").read_text(encoding="utf-8"))
    (export / "transformer" / "config.json").write_text(json.dumps(config | {"num_layers": 31}))
    assert native_sampling(export) is None


def test_native_runs_have_nothing_to_note() -> None:
    for made in (rollout(V21, 1), rollout(V21, 1, size=2048), rollout(V1, 4, num_steps=50, rescale=True)):
        assert notes(made) == problems_of_guidance(made) == []
    assert any("none (scale 1)" in line for line in describe(rollout(V21, 1)))
    assert any("4, with rescaled norm" in line for line in describe(rollout(V1, 4)))


@pytest.mark.parametrize("scale", [1.5, 2.0])
def test_little_guidance_on_21_is_an_experiment(scale: float) -> None:
    (note,) = notes(rollout(V21, scale))
    assert f"model.rollout.guidance.scale is {scale:g}, an experiment" in note
    assert "true_cfg_scale 1.0" in note
    assert "Set it to 1 and model.rollout.cfg to none" in note
    assert problems_of_guidance(rollout(V21, scale)) == []


@pytest.mark.parametrize("scale", [2.5, 4.0])
def test_the_guidance_of_v1_is_out_of_range_on_21(scale: float) -> None:
    made = rollout(V21, scale)
    assert notes(made) == []  # said once
    (problem,) = problems_of_guidance(made)
    assert f"model.rollout.guidance.scale is {scale:g}, which is out of range for {V21}" in problem
    assert "Set it to 1 and model.rollout.cfg to none" in problem


def test_other_guidance_on_v1_is_noted() -> None:
    native = {"num_steps": 50, "rescale": True}
    (other,) = notes(rollout(V1, 2.5, **native))
    assert "is 2.5" in other
    assert "Set it to 4 and model.rollout.guidance.rescale to true" in other
    (student,) = notes(rollout(V1, 1, num_steps=50))
    assert "right for a distilled student alone" in student
    (interval,) = notes(rollout(V1, 4, low=0.6, **native))
    assert "acts at 0.6 < sigma <= 1 alone" in interval


def test_sizes_and_steps_are_noted() -> None:
    size, steps = notes(rollout(V21, 1, size=512, num_steps=10))
    assert "model.image_size is 512" in size
    assert "made for 1024 or 2048" in size
    assert "model.rollout.num_steps is 10" in steps
    assert "sampled in 40" in steps


def test_teachers_and_students_are_compared() -> None:
    teachers = {"t2i": TeacherSettings(guidance=Guidance(scale=4)), "edit": TeacherSettings(guidance=Guidance(scale=1))}

    def student(stage: str = "fit", guidance: float = 1.0) -> Setup:
        module = DistillationStudent(
            model_path=V21,
            image_size=1024,
            teachers=teachers,
            optimizer=partial(torch.optim.AdamW, lr=1e-3),
            distillation=DistillationSettings(num_steps=20),
            guidance=guidance,
        )
        return Setup(model=module, data=None, trainer={}, stage=stage)

    (problem,) = problems_of_guidance(student())
    assert "model.teachers.t2i.guidance.scale is 4" in problem
    assert "or to the guidance that this teacher's rollouts had" in problem
    assert "model.distillation.num_steps is 20" in notes(student())[0]
    tested = student("test")  # without its teachers
    assert problems_of_guidance(tested) == []
    (problem,) = problems_of_guidance(student("test", guidance=3.0))
    assert "a student has learnt its teachers' guidance" in problem


def test_the_plan_is_printed_before_guidance_is_refused(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=10**15))
    run = ["doctor", "--config=configs/qwen_image_21/grpo_t2i.yaml", *write_data(tmp_path, edit=False)]
    run += [f"--run.dir={tmp_path}"]
    app.main(run)
    assert f"native sampling of {V21}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        app.main([*run, "--model.rollout.guidance.scale=4", "--model.rollout.cfg=rollout_only"])
    shown = capsys.readouterr()
    assert "at the fullest" in shown.out
    assert "is 4, which is out of range" in shown.err


def test_a_run_that_starts_out_of_range_is_warned(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(app.FlowCLI, "_run_subcommand", lambda _cli, _subcommand: None)
    run = ["fit", "--config=configs/qwen_image_21/grpo_t2i.yaml", *write_data(tmp_path, edit=False)]
    run += [f"--run.dir={tmp_path}", "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto"]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        app.main(run)
        assert not any("out of range" in str(warning.message) for warning in said)
        app.main([*run, "--model.rollout.guidance.scale=4", "--model.rollout.cfg=rollout_only"])
    assert any("out of range" in str(warning.message) for warning in said)


@pytest.mark.parametrize("family", ["qwen_image_21", "qwen_image"])
@pytest.mark.parametrize("task", ["t2i", "edit"])
def test_test_configs_sample_the_base_as_it_is_meant(family: str, task: str, tmp_path: Path, monkeypatch) -> None:
    """Whatever guidance the training config below has."""
    monkeypatch.chdir(ROOT)
    built: list[app.FlowCLI] = []
    monkeypatch.setattr(app.FlowCLI, "_run_subcommand", lambda cli, _subcommand: built.append(cli))
    training = f"configs/{family}/grpo_{task}.yaml"
    module = whole(training)["model"]
    rescale = family == "qwen_image"
    other = {"guidance": {"scale": 1.5, "low": 0.5, "rescale": rescale}, "cfg": "rollout_only"}
    experiment = {"model": {"class_path": module["class_path"], "init_args": {"rollout": other}}}
    stack = [training, written(tmp_path / "experiment.yaml", experiment)]
    stack += [f"configs/{family}/{'test_edit' if task == 'edit' else 'test'}.yaml"]
    run = ["test", *(f"--config={path}" for path in stack), *write_data(tmp_path, edit=task == "edit")]
    run += [f"--run.dir={tmp_path}", "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto"]
    app.main(run)
    sampled, native = built[0].model.rollout_settings.guidance, native_sampling(module["init_args"]["model_path"])
    assert sampled.scale == native.guidance
    if native.guidance != 1:
        assert sampled == Guidance(scale=native.guidance, rescale=native.rescale)
