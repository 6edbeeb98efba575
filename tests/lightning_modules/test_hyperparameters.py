"""Every stage says by which settings its runs are compared in TensorBoard."""

from __future__ import annotations

from functools import partial

import torch

from flow_rl.models.adapters import LoraSettings
from lightning_modules import FlowPretrain
from tests.toy_vlm import toy_files, toy_module


def test_stages_that_step_by_themselves_name_theirs(tiny_path) -> None:
    pretrain = FlowPretrain(model_path=tiny_path, image_size=32, optimizer=partial(torch.optim.AdamW, lr=1e-3), seed=3)
    assert pretrain.hyperparameters() == {"model_path": tiny_path, "image_size": 32, "gradient_clip": 1.0, "seed": 3}
    reward = toy_module(lora=LoraSettings(rank=4, alpha=8)).hyperparameters()
    assert reward["model_path"] == toy_files()["model"]
    assert reward["lora/rank"] == "4"
    assert "image_size" not in reward


def test_a_policy_names_its_rollout_and_its_objective(policy) -> None:
    found = policy("clipped", objective={"clip_range": 2e-4}).hyperparameters()
    assert found["objective"] == "Clipped"
    assert found["objective/clip_range"] == "0.0002"
    assert found["rollout/num_steps"] == "4"


def test_a_student_names_its_distillation(student) -> None:
    assert student({"num_steps": 4}).hyperparameters()["distillation/num_steps"] == "4"
