"""A tiny pipeline with random weights that are large enough to matter, and a policy around it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import QwenImage21Pipeline
from PIL import Image

from datamodules import EditPairDataModule, MixedTaskDataModule, PromptDataModule
from flow_rl.models import QwenImage21
from flow_rl.models.tiny.qwen_image_21 import build_pipeline, build_transformer
from lightning_modules import GRPOPolicy
from tests.toy_policy import toy_policy

#: files whose tests look at the one model that `toy_vlm.trained` trains
TOY_VLM = ("test_vlm_reward", "test_reward_finetune")
CATEGORIES = ("portrait", "plant")
TEXTS = ("a portrait of a person with red hair", "a tulip in a blue pot, yellow background", "a red pot")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=1, help="how often each kill test of tests/dist is repeated")
    parser.addoption(
        "--chance", type=int, help="seed of the random moments in tests of kills; drawn and printed if omitted"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With several workers, a file's tests stay together for their fixtures' sake, and runs of two ranks do, too."""
    kills = config.getoption("--kills")
    for item in items:
        if kills > 1:
            item.add_marker(pytest.mark.timeout(kills * float(config.getini("timeout"))))
        group = "dist" if item.get_closest_marker("dist") else item.path.name
        if item.path.stem in TOY_VLM:
            group = "toy_vlm"
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_runtest_setup() -> None:
    """Before every test and its fixtures, since code under test may set both, as `train.py` does.

    Sums over another number of threads round differently. A random model is full of denormals.
    """
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)
    torch.set_flush_denormal(True)


@pytest.fixture(scope="session")
def tiny_pipeline() -> QwenImage21Pipeline:
    pipeline = build_pipeline(TEXTS * 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline.register_modules(transformer=build_transformer(num_layers=2))  # as deep as a test needs
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # a fresh model's last layer is zero, and its velocity with it
        for weight in (pipeline.transformer.proj_out.weight, pipeline.transformer.modulation[1].weight):
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return pipeline


@pytest.fixture
def tiny_model(tiny_pipeline: QwenImage21Pipeline) -> QwenImage21:
    return QwenImage21(tiny_pipeline, image_size=(32, 32))


@pytest.fixture(scope="session")
def tiny_path(tiny_pipeline: QwenImage21Pipeline, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def prompt_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three small prompt files, by the argument names of `PromptDataModule`."""
    directory, files, first = tmp_path_factory.mktemp("prompts"), {}, 0
    for split, count in (("train", 12), ("validation", 4), ("test", 4)):
        path = Path(directory) / f"{split}.jsonl"
        rows = [{"id": first + i, "prompt": TEXTS[i % 3], "category": CATEGORIES[i % 2]} for i in range(count)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files[f"{split}_file"], first = str(path), first + count
    return files


@pytest.fixture
def data(prompt_files: dict[str, str]) -> Callable[..., PromptDataModule]:
    def make(**changes: object) -> PromptDataModule:
        return PromptDataModule(**prompt_files, **({"prompts_per_step": 2} | changes))

    return make


@pytest.fixture(scope="session")
def edit_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three small edit files, by the argument names of `EditPairDataModule`, with the ids of `prompt_files`."""
    directory, files, first = tmp_path_factory.mktemp("edits"), {}, 0
    noise = np.random.default_rng(0)
    for split, count in (("train", 12), ("validation", 4), ("test", 4)):
        rows = []
        for i in range(first, first + count):
            Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(directory / f"{i}.png")
            row = {"id": i, "instruction": ("make the pot red", "dye the hair blue")[i % 2], "source": f"{i}.png"}
            rows.append(row | {"category": CATEGORIES[i % 2]})
        path = directory / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files[f"{split}_file"], first = str(path), first + count
    return files


@pytest.fixture
def edits(edit_files: dict[str, str]) -> Callable[..., EditPairDataModule]:
    def make(**changes: object) -> EditPairDataModule:
        return EditPairDataModule(image_size=32, **edit_files, **({"prompts_per_step": 2} | changes))

    return make


@pytest.fixture
def mixed(data: Callable[..., PromptDataModule], edits: Callable[..., EditPairDataModule]) -> MixedTaskDataModule:
    """Two prompts and one edit an iteration; both files use the same ids."""
    return MixedTaskDataModule(data(), edits(prompts_per_step=1, seed=5))


@pytest.fixture
def policy(tiny_path: str) -> Callable[..., GRPOPolicy]:
    """`policy(kind, rollout={...}, objective={...}, **arguments)`: a small policy with a planted reward."""
    return partial(toy_policy, tiny_path)
