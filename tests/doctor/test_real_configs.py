"""The configs of released models: planned at their real sizes on the meta device, and run for a step on a toy."""

from __future__ import annotations

import re
from pathlib import Path

import diffusers
import pytest
import torch
from real_runs import ROOT, toy_overlay, write_data
from toy_vlm import toy_files

import train
from models.loading import read_config
from models.tiny_v1 import build_pipeline_v1

CONFIGS = [
    f"configs/{family}/grpo_{task}.yaml" for family in ("qwen_image_21", "qwen_image") for task in ("t2i", "edit")
]
PATHS = {
    "configs/qwen_image_21/grpo_t2i.yaml": "Qwen/Qwen-Image-2.1",
    "configs/qwen_image_21/grpo_edit.yaml": "Qwen/Qwen-Image-2.1",
    "configs/qwen_image/grpo_t2i.yaml": "Qwen/Qwen-Image",
    "configs/qwen_image/grpo_edit.yaml": "Qwen/Qwen-Image-Edit-2509",
}


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 10**15}))


def plan(capsys, *args: str) -> str:
    train.main(["doctor", *args])
    return capsys.readouterr().out


@pytest.mark.parametrize("config", CONFIGS)
def test_plan_states_the_parameters_of_diffusers_classes(config, tmp_path, capsys) -> None:
    edit = "edit" in config
    shown = plan(capsys, f"--config={config}", *write_data(tmp_path, edit=edit), f"--run.dir={tmp_path}")
    with torch.device("meta"):
        for part in ("transformer", "vae"):
            card = read_config(PATHS[config], part)
            model = getattr(diffusers, card["_class_name"]).from_config(card)
            assert re.search(rf"{part} +{sum(p.numel() for p in model.parameters()):,}\n", shown)
    assert re.search(r"32 x 16 = 512 samples, 64 a rank on 8", shown)
    assert re.search(r"rollout, conditional +2,560 ", shown)
    assert re.search(r"rollout, unconditional +2,560 ", shown)
    assert re.search(r"training +192 ", shown)  # 64 samples of 3 trained steps
    assert f"{1024} target + {1024 if edit else 0} source" in shown


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


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_one_step_on_a_toy_of_the_family(config, adapter, tmp_path, tiny_path, v1_paths) -> None:
    edit, family = "edit" in config, Path(config).parent.name
    path = tiny_path if family == "qwen_image_21" else v1_paths["edit_plus" if edit else "t2i"]
    stack = [f"--config={config}"]
    if adapter:
        stack.append(f"--config=configs/{family}/lora_1x80gb.yaml")
    stack.append(f"--config={toy_overlay(tmp_path, config, path, edit=edit)}")
    train.main(["fit", *stack, *write_data(tmp_path, edit=edit, count=4), "--trainer.limit_val_batches=0"])
    assert (tmp_path / "run" / "export" / "model_index.json").is_file()


def test_test_config_is_sound(tmp_path, capsys) -> None:
    stack = ["--config=configs/qwen_image_21/grpo_t2i.yaml", "--config=configs/qwen_image_21/test.yaml"]
    given = [*stack, *write_data(tmp_path, edit=False), f"--run.dir={tmp_path}"]
    assert "sound" in plan(capsys, "--stage=test", *given)
    with pytest.raises(SystemExit):  # its callbacks keep no checkpoint, so it is nothing to train with
        plan(capsys, *given)


def test_reward_config_is_sound(tmp_path, capsys) -> None:
    toy = toy_files()
    files = [f"--data.{n}_files=[{toy[f]}]" for n, f in (("train", "train"), ("validation", "validation"))]
    shown = plan(
        capsys, "--config=configs/qwen_image_21/reward.yaml", *files, f"--data.test_files=[{toy['validation']}]",
        f"--model.model_path={toy['model']}", f"--model.rubrics={{'brightness': '{toy['brightness']}'}}",
        f"--run.dir={tmp_path}",
    )  # fmt: skip
    assert "The configuration is sound" in shown


def test_every_real_config_is_in_a_test() -> None:
    shipped = {
        str(p.relative_to(ROOT)) for f in ("qwen_image_21", "qwen_image") for p in (ROOT / "configs" / f).iterdir()
    }
    stacked = {f"configs/{family}/lora_1x80gb.yaml" for family in ("qwen_image_21", "qwen_image")}
    others = {"configs/qwen_image_21/test.yaml", "configs/qwen_image_21/reward.yaml"}
    assert shipped == {*CONFIGS, *stacked, *others}


@pytest.fixture(scope="module")
def v1_paths(tmp_path_factory) -> dict[str, str]:
    made = {}
    for kind in ("t2i", "edit_plus"):
        made[kind] = str(tmp_path_factory.mktemp("v1") / kind)
        build_pipeline_v1(["a red pot", "make it red"] * 4, kind=kind).save_pretrained(made[kind])
    return made
