"""Students of small random teachers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from datamodules import AlternatingTaskDataModule, EditPairDataModule, PromptDataModule
from flow_rl.distillation.settings import DistillationSettings, TeacherSettings
from flow_rl.flow.guidance import Guidance
from flow_rl.models import load_image_model
from flow_rl.models.adapters import add_lora, save_adapter
from lightning_modules import DistillationStudent

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="session")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`moved(path, seed)`: a copy of a model whose transformer's weights are all a little off."""

    def make(path: str, seed: int, amount: float = 0.05) -> str:
        target = tmp_path_factory.mktemp("moved") / f"teacher{seed}"
        shutil.copytree(path, target)
        generator, state = torch.Generator().manual_seed(seed), load_file(target / WEIGHTS)
        for name, tensor in state.items():
            scale = tensor.std() if tensor.numel() > 1 else tensor.abs()
            state[name] = tensor + amount * scale * torch.randn(tensor.shape, generator=generator)
        save_file(state, target / WEIGHTS, metadata={"format": "pt"})
        return str(target)

    return make


@pytest.fixture(scope="session")
def t2i_teacher(tiny_path: str, moved) -> str:
    return moved(tiny_path, 1)


@pytest.fixture(scope="session")
def edit_teacher(tiny_path: str, moved) -> str:
    return moved(tiny_path, 2)


@pytest.fixture(scope="session")
def adapters(tiny_path: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """`adapters(seed)`: the directory of a LoRA over the tiny base, far from zero."""
    made: dict[int, str] = {}

    def make(seed: int) -> str:
        if seed not in made:
            model = load_image_model(tiny_path, image_size=(32, 32))
            add_lora(model.transformer, rank=4, alpha=8, dropout=0.0, targets=model.lora_targets)
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for name, parameter in model.transformer.named_parameters():
                    if "lora_" in name:
                        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
            made[seed] = str(tmp_path_factory.mktemp("adapter") / str(seed))
            save_adapter(model.transformer, made[seed])
        return made[seed]

    return make


@pytest.fixture
def student(tiny_path: str, t2i_teacher: str, edit_teacher: str) -> Callable[..., DistillationStudent]:
    """`student(distillation={...}, **arguments)`: two guided teachers, four steps."""

    def make(distillation: dict | None = None, **changes: object) -> DistillationStudent:
        teachers = {
            "t2i": TeacherSettings(path=t2i_teacher, guidance=Guidance(scale=2.5, low=0.6)),
            "edit": TeacherSettings(path=edit_teacher, guidance=Guidance(scale=1.5)),
        }
        arguments = {
            "model_path": tiny_path,
            "image_size": 32,
            "teachers": teachers,
            "optimizer": partial(torch.optim.AdamW, lr=1e-3),
            "distillation": DistillationSettings(**({"num_steps": 4, "micro_batch_size": 5} | (distillation or {}))),
        } | changes
        return DistillationStudent(**arguments)

    return make


@pytest.fixture
def tasks_data(prompt_files, edit_files) -> Callable[..., AlternatingTaskDataModule]:
    def make(**changes: object) -> AlternatingTaskDataModule:
        tasks = {
            "t2i": PromptDataModule(**prompt_files, prompts_per_step=3),
            "edit": EditPairDataModule(image_size=32, **edit_files, prompts_per_step=2),
        }
        return AlternatingTaskDataModule(**tasks, **changes)

    return make
