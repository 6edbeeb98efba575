"""Files and overrides that let the real configs run in a test: prompts, edits, and a planted reward."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from PIL import Image

ROOT = Path(__file__).parents[2]
PLANTED = {"class_path": "planted.Brightness"}


def write_data(directory: Path, *, edit: bool, count: int = 32) -> list[str]:
    """Three small files; the overrides that point at them."""
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
        overrides.append(f"--data.{split}_file={path}")
        first += rows
    return overrides


def toy_overlay(directory: Path, config: str, model_path: str, *, edit: bool) -> str:
    """A config to stack last: the same run on a toy, with rewards of its names that need no service."""
    real = yaml.safe_load((ROOT / config).read_text(encoding="utf-8"))
    names = list(real["model"]["init_args"]["reward_weights"])
    overlay = {
        "run": {"dir": str(directory), "name": "run"},
        "model": {
            "class_path": real["model"]["class_path"],
            "init_args": {
                "model_path": model_path, "image_size": 32, "rewards": dict.fromkeys(names, PLANTED),
                "rollout": {"group_size": 2, "num_steps": 10, "allow_coarse_guidance": True},
            },
        },
        "data": {
            "class_path": real["data"]["class_path"],
            "init_args": {"prompts_per_step": 2} | ({"image_size": 32} if edit else {}),
        },
        "trainer": {"accelerator": "cpu", "devices": 1, "strategy": "auto", "max_steps": 1, "logger": False},
    }  # fmt: skip
    path = directory / "toy.yaml"
    path.write_text(yaml.safe_dump(overlay), encoding="utf-8")
    return str(path)
