"""The configs of released models: planned at their real sizes on the meta device, and run for a step on a toy."""

from __future__ import annotations

import re
from pathlib import Path

import diffusers
import pytest
import torch

from cli import app
from flow_rl.models.loading import read_config
from flow_rl.models.tiny.qwen_image import build_pipeline_v1
from tests.cli.real_runs import ROOT, toy_overlay, toy_teachers, write_both, write_data, written
from tests.toy_vlm import toy_files

CONFIGS = [
    f"configs/{family}/grpo_{task}.yaml" for family in ("qwen_image_21", "qwen_image") for task in ("t2i", "edit")
]
PATHS = {
    "configs/qwen_image_21/grpo_t2i.yaml": "Qwen/Qwen-Image-2.1",
    "configs/qwen_image_21/grpo_edit.yaml": "Qwen/Qwen-Image-2.1",
    "configs/qwen_image/grpo_t2i.yaml": "Qwen/Qwen-Image",
    "configs/qwen_image/grpo_edit.yaml": "Qwen/Qwen-Image-Edit-2509",
}


#: a plan takes ten seconds: text-to-image of one family, and edits of the other
EACH_FAMILY_ONCE = [
    pytest.param(config, marks=() if number in (0, 3) else pytest.mark.slow) for number, config in enumerate(CONFIGS)
]
SLOW_TO_CURATE = [
    pytest.param(config, marks=pytest.mark.slow)
    for config in CONFIGS
    if config != "configs/qwen_image_21/grpo_t2i.yaml"
]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 10**15}))


MIX, DISTILL = "configs/qwen_image_21/mix_rl.yaml", "configs/qwen_image_21/distill.yaml"
CURATED_MIX = "configs/qwen_image_21/mix_rl_curated.yaml"
BASE = "Qwen/Qwen-Image-2.1"


def adapter_of(config: str) -> str:
    """The config that turns a run into one of an adapter on one GPU."""
    return str(Path(config).parent / ("distill_lora_1x80gb.yaml" if config == DISTILL else "lora_1x80gb.yaml"))


def assert_parameters(shown: str, path: str) -> None:
    with torch.device("meta"):
        for part in ("transformer", "vae"):
            card = read_config(path, part)
            model = getattr(diffusers, card["_class_name"]).from_config(card)
            assert re.search(rf"{part} +{sum(p.numel() for p in model.parameters()):,}\n", shown)


def plan(capsys, *args: str) -> str:
    app.main(["doctor", *args])
    return capsys.readouterr().out


@pytest.mark.parametrize("config", EACH_FAMILY_ONCE)
def test_plan_states_the_parameters_of_diffusers_classes(config, tmp_path, capsys) -> None:
    edit = "edit" in config
    shown = plan(capsys, f"--config={config}", *write_data(tmp_path, edit=edit), f"--run.dir={tmp_path}")
    assert_parameters(shown, PATHS[config])
    assert re.search(r"32 x 16 = 512 samples, 64 a rank on 8", shown)
    assert re.search(r"rollout, conditional +2,560 ", shown)
    guided = PATHS[config] != BASE  # Qwen-Image 2.1 is sampled without guidance
    assert (re.search(r"rollout, unconditional +2,560 ", shown) is not None) is guided
    assert "guidance.scale" not in shown  # no note on it: each family's own
    assert re.search(r"training +192 ", shown)  # 64 samples of 3 trained steps
    assert f"{1024} target + {1024 if edit else 0} source" in shown


def test_plan_of_both_tasks_at_once(tmp_path, capsys) -> None:
    shown = plan(capsys, f"--config={MIX}", *write_both(tmp_path), f"--run.dir={tmp_path}")
    assert_parameters(shown, BASE)
    assert re.search(r"32 x 16 = 512 samples, 64 a rank on 8", shown)  # 16 prompts and 16 edits
    assert re.search(r"training +192 ", shown)
    assert "1024 target + 1024 source" in shown


@pytest.mark.parametrize("config", [CONFIGS[0], pytest.param(CONFIGS[2], marks=pytest.mark.slow)])
def test_plan_of_an_adapter(config, tmp_path, capsys) -> None:
    stack = [f"--config={config}", f"--config={adapter_of(config)}"]
    shown = plan(capsys, *stack, *write_data(tmp_path, edit=False), f"--run.dir={tmp_path}")
    path = PATHS[config]
    with torch.device("meta"):
        whole = diffusers.AutoModel.from_config(read_config(path, "transformer"))
    trained = int(re.search(r"trained +([\d,]+)", shown)[1].replace(",", ""))
    assert 0 < trained < 0.05 * sum(p.numel() for p in whole.parameters())
    assert "teacher" not in shown


@pytest.mark.parametrize("adapter", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_plan_of_a_distillation(adapter, tmp_path, capsys) -> None:
    stack = [f"--config={DISTILL}"] + [f"--config={adapter_of(DISTILL)}"] * adapter
    # its teachers are trained first: the base stands in for them
    base = {"model": {"class_path": "lightning_modules.DistillationStudent", "init_args": toy_teachers(BASE)}}
    stack.append(f"--config={written(tmp_path / 'teachers.yaml', base)}")
    shown = plan(capsys, *stack, *write_both(tmp_path), f"--run.dir={tmp_path}")
    assert_parameters(shown, BASE) if not adapter else None
    ranks = 1 if adapter else 8
    assert re.search(rf"64 x 1 = 64 samples, {64 // ranks} a rank on {ranks}\n", shown)
    for phase, evaluations in (("student's rollout", 2560), ("teacher", 5120), ("training", 2560)):
        assert re.search(rf"{phase} +{evaluations // ranks:,} ", shown)
    # One teacher in turn, in bfloat16 and in as many pieces as the student; an adapter's own base plays all of them.
    found = re.search(r"teacher in turn +([\d.]+) GB .*?([\d.]+) GB on the host|teacher in turn", shown)
    assert (found is None) is adapter
    if found:
        assert float(found[1]) == pytest.approx(7_115_124_736 * 2 / 8 / 1e9, abs=0.01)
        assert float(found[2]) == pytest.approx(float(found[1]), abs=0.01)


def test_teachers_and_scores_that_are_not_there_are_told(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        plan(capsys, f"--config={DISTILL}", *write_both(tmp_path), f"--run.dir={tmp_path}")
    message = capsys.readouterr().err
    assert "model.teachers.t2i: No model directory" in message
    assert "Train that teacher first" in message
    rows = written(
        tmp_path / "t2i_teacher_weights.yaml", {"default": {"alignment": 1.0, "aesthetic": 0, "portrait": 0}}
    )
    (tmp_path / "curation").mkdir()
    Path(rows).rename(tmp_path / "curation" / "t2i_teacher_weights.yaml")
    stack = [f"--config=configs/qwen_image_21/{name}.yaml" for name in ("grpo_t2i", "curated")]
    with pytest.raises(SystemExit):
        plan(capsys, *stack, *write_data(tmp_path, edit=False), f"--run.dir={tmp_path}")
    assert "t2i_teacher.safetensors'. Run train.py curate" in capsys.readouterr().err


def test_fit_keeps_the_work_and_proposes_what_fits(tmp_path, capsys) -> None:
    files = write_data(tmp_path, edit=False)
    shown = plan(
        capsys, "--fit", "8xH100-80GB", "--config=configs/qwen_image_21/grpo_t2i.yaml", *files, f"--run.dir={tmp_path}"
    )
    proposal = shown[shown.index("proposal") :]
    assert "groups x size x updates stay 32 x 16 x 1" in proposal
    assert float(re.search(r"at the fullest +([\d.]+) GB", proposal)[1]) <= 0.9 * 80
    micro, added = (
        int(re.search(r"micro_batch_size=(\d+)", proposal)[1]),
        int(re.search(r"(\d+) backwards", proposal)[1]),
    )
    assert micro * added == 32 * 16 * 3 // 8


ONE_STEP = [(config, False) for config in (*CONFIGS, MIX, DISTILL)] + [(CONFIGS[0], True)]
#: an adapter's frozen weights are in bfloat16, which a CPU is slow at
ONE_STEP += [pytest.param(config, True, marks=pytest.mark.slow) for config in (*CONFIGS[1:], MIX, DISTILL)]


@pytest.mark.parametrize(("config", "adapter"), ONE_STEP)
def test_one_step_on_a_toy_of_the_family(config, adapter, tmp_path, tiny_path, v1_paths) -> None:
    stack = [f"--config={config}"] + [f"--config={adapter_of(config)}"] * adapter
    if config in (MIX, DISTILL):
        path, files = tiny_path, write_both(tmp_path, count=4)
    else:
        edit = "edit" in config
        path = tiny_path if "qwen_image_21" in config else v1_paths["edit_plus" if edit else "t2i"]
        files = write_data(tmp_path, edit=edit, count=4)
    stack.append(f"--config={toy_overlay(tmp_path, config, path)}")
    app.main(["fit", *stack, *files, "--trainer.limit_val_batches=0"])
    assert (tmp_path / "run" / "export" / "model_index.json").is_file()
    assert (tmp_path / "run" / "adapter").is_dir() is (adapter and config != DISTILL)


@pytest.mark.parametrize("config", ["configs/qwen_image_21/grpo_t2i.yaml", *SLOW_TO_CURATE])
def test_curated_on_a_toy_of_the_family(config, tmp_path, tiny_path, v1_paths, capsys) -> None:
    """Curate, then train on what is kept with the suggested weights, as the headers say."""
    edit, family = "edit" in config, Path(config).parent
    path = tiny_path if family.name == "qwen_image_21" else v1_paths["edit_plus" if edit else "t2i"]
    files = write_data(tmp_path, edit=edit, count=4)
    toy = f"--config={toy_overlay(tmp_path, config, path, reward='tests.planted.Erratic')}"
    app.main(["curate", f"--config={config}", f"--config={family}/curate.yaml", toy, *files])
    assert "plant" in capsys.readouterr().out
    assert (tmp_path / "curation" / "run.safetensors").is_file()
    app.main(
        ["fit", f"--config={config}", f"--config={family}/curated.yaml", toy, *files, "--trainer.limit_val_batches=0"]
    )
    assert (tmp_path / "run" / "export" / "model_index.json").is_file()


@pytest.mark.parametrize("config", [*CONFIGS[:2], *(pytest.param(c, marks=pytest.mark.slow) for c in CONFIGS[2:])])
def test_test_config_is_sound(config, tmp_path, capsys) -> None:
    edit, family = "edit" in config, Path(config).parent
    stack = [f"--config={config}", f"--config={family}/{'test_edit' if edit else 'test'}.yaml"]
    given = [*stack, *write_data(tmp_path, edit=edit), f"--run.dir={tmp_path}"]
    assert "sound" in plan(capsys, "--stage=test", *given)
    with pytest.raises(SystemExit):  # its callbacks keep no checkpoint, so it is nothing to train with
        plan(capsys, *given)


@pytest.mark.parametrize("adapter", [True, False])
def test_reward_config_is_sound(adapter, tmp_path, capsys) -> None:
    toy = toy_files()
    files = [f"--data.{n}_files=[{toy[f]}]" for n, f in (("train", "train"), ("validation", "validation"))]
    stack = ["--config=configs/qwen_image_21/reward.yaml"]
    stack += ["--config=configs/qwen_image_21/reward_8x80gb.yaml"] * (not adapter)
    shown = plan(
        capsys, *stack, *files, f"--data.test_files=[{toy['validation']}]",
        f"--model.model_path={toy['model']}", f"--model.rubrics={{'brightness': '{toy['brightness']}'}}",
        f"--run.dir={tmp_path}",
    )  # fmt: skip
    assert "The configuration is sound" in shown


def test_every_real_config_is_in_a_test() -> None:
    shipped = {
        str(p.relative_to(ROOT)) for f in ("qwen_image_21", "qwen_image") for p in (ROOT / "configs" / f).iterdir()
    }
    stacked = {f"configs/{family}/lora_1x80gb.yaml" for family in ("qwen_image_21", "qwen_image")}
    names = ("test", "test_edit", "curate", "curated")
    stacked |= {f"configs/{family}/{name}.yaml" for family in ("qwen_image_21", "qwen_image") for name in names}
    rewards = {f"configs/qwen_image_21/{name}.yaml" for name in ("reward", "reward_8x80gb")}
    assert shipped == {*CONFIGS, *stacked, *rewards, MIX, CURATED_MIX, DISTILL, adapter_of(DISTILL)}


@pytest.fixture(scope="module")
def v1_paths(tmp_path_factory) -> dict[str, str]:
    made = {}
    for kind in ("t2i", "edit_plus"):
        made[kind] = str(tmp_path_factory.mktemp("v1") / kind)
        build_pipeline_v1(["a red pot", "make it red"] * 4, kind=kind).save_pretrained(made[kind])
    return made
