"""Files and overrides that let the real configs run in a test: prompts, edits, and a planted reward."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from PIL import Image

from cli.config_stack import content_of, expand

ROOT = Path(__file__).parents[2]


def write_data(directory: Path, *, edit: bool, count: int = 32, prefix: str = "data") -> list[str]:
    """Three small files; the overrides that point the settings below `prefix` at them."""
    for i in range(2):
        Image.new("RGB", (32, 32), (90 * i, 40, 200)).save(directory / f"source{i}.png")
    overrides, first = [], 0
    for split, rows in (("train", count), ("validation", 2), ("test", 2)):
        lines = []
        for i in range(first, first + rows):
            text = {"instruction": "make it red", "source": f"source{i % 2}.png"} if edit else {"prompt": "a red pot"}
            lines.append(json.dumps({"id": i, "category": "plant"} | text) + "\n")
        path = directory / f"{split}.jsonl"
        path.write_text("".join(lines), encoding="utf-8")
        overrides.append(f"--{prefix}.{split}_file={path}")
        first += rows
    return overrides


def write_both(directory: Path, count: int = 64) -> list[str]:
    """As `write_data`, prompts and edits for a run of both tasks."""
    overrides = []
    for task in ("t2i", "edit"):
        (directory / task).mkdir()
        overrides += write_data(directory / task, edit=task == "edit", count=count, prefix=f"data.{task}")
    return overrides


def whole(config: str) -> dict:
    """A config of the project with what it includes, nothing resolved."""
    files = [argument.removeprefix("--config=") for argument in expand([f"--config={ROOT / config}"])]
    return OmegaConf.to_container(OmegaConf.merge(*(OmegaConf.create(dict(content_of(path))) for path in files)))


def toy_overlay(directory: Path, config: str, model_path: str, *, reward: str = "tests.planted.Brightness") -> str:
    """A config to stack last: the same run on a toy, with rewards of its names that need no service."""
    real = whole(config)
    given = real["model"]["init_args"]
    model = {
        "model_path": model_path,
        "image_size": 32,
        **{k: {name: {"class_path": reward} for name in given[k]} for k in ("rewards", "monitors") if k in given},
    }
    if "distillation" in given:
        model |= {"distillation": {"num_steps": 3, "micro_batch_size": 4}} | toy_teachers(model_path)
    else:
        model["rollout"] = {"group_size": 2, "num_steps": 8, "allow_coarse_guidance": True}
    parts = real["data"]["init_args"]
    if "t2i" in parts:
        kinds = {task: {"class_path": parts[task]["class_path"]} for task in ("t2i", "edit")}
        data = {task: kind | {"init_args": {"prompts_per_step": 2}} for task, kind in kinds.items()}
    else:
        data = {"prompts_per_step": 2} | ({"image_size": 32} if "image_size" in parts else {})
    overlay = {
        "run": {"dir": str(directory), "name": "run"},
        "model": {"class_path": real["model"]["class_path"], "init_args": model},
        "data": {"class_path": real["data"]["class_path"], "init_args": data},
        "trainer": {"accelerator": "cpu", "devices": 1, "strategy": "auto", "max_steps": 1, "logger": False},
        "callbacks": {"ema": {"init_args": {"every": 1, "warmup": 9.0}}},  # the run's own average would stay the base
    }
    return written(directory / "toy.yaml", overlay)


def toy_teachers(path: str) -> dict[str, dict]:
    """Both teachers at one place."""
    return {"teachers": {task: {"path": path, "adapter": None, "guidance": {"scale": 2.0}} for task in ("t2i", "edit")}}


def written(path: Path, content: dict) -> str:
    """A config's file."""
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)
