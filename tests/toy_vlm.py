"""A tiny random Qwen3-VL on disk, and data it can learn in seconds: how bright is a grey picture?"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache, partial
from pathlib import Path

import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torchvision.utils import save_image

from callbacks import ExportModel, ScoredExamples
from datamodules import AnnotationDataModule
from flow_rl.models.tiny.qwen_image_21 import build_processor, build_text_encoder, build_tokenizer
from flow_rl.rewards.finetune_settings import RewardObjective
from flow_rl.rewards.reading import ReadingSettings
from flow_rl.rewards.rubrics import Rubric
from lightning_modules import RewardFinetune

BRIGHTNESS_RUBRIC = {
    "name": "brightness",
    "version": 1,
    "task": "t2i",
    "text": "How bright is it?",
    "reasoning_hint": "One word.",
}
CHANGE_RUBRIC = BRIGHTNESS_RUBRIC | {"name": "change", "task": "edit", "text": "How much brighter is it?"}
WORDS = ("black", "dark", "grey", "light", "white")


def rubric(**changes: object) -> Rubric:
    return Rubric.from_dict(BRIGHTNESS_RUBRIC | changes, where="test")


def save_tiny_vlm(directory: Path) -> str:
    """Write model and processor; the weights are large enough to tell inputs apart."""
    texts = [BRIGHTNESS_RUBRIC["text"], "One word. Prompt: a square\nImage: ", "Score: ", *WORDS] * 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = build_tokenizer(texts, vocab_size=360)
        model = build_text_encoder(tokenizer, hidden_size=64, num_layers=2)
    model.save_pretrained(directory)
    build_processor(tokenizer).save_pretrained(directory)
    return str(directory)


def grey(level: float, seed: int) -> torch.Tensor:
    """A picture in [0, 1] of the given mean brightness with some noise, (3, 32, 32)."""
    noise = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 0.03
    return (level + noise).clamp(0, 1)


def write_annotations(directory: Path, name: str, count: int, *, seed: int, edits: bool = False) -> str:
    """Pictures and their scores: 1 for black to 5 for white; an edit's score is that of its result."""
    (directory / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        score = 1 + (i * 7 + seed) % 5
        image = f"images/{name}-{i}.png"
        save_image(grey((score - 1) / 4, 1000 * seed + i), directory / image)
        row = {
            "id": i, "image": image, "prompt": "a square" + " of grey" * (i % 3), "dimension": "brightness",
            "score": score, "reasoning": WORDS[score - 1], "group": i // 4,
        }  # fmt: skip
        if edits:
            source = f"images/{name}-{i}-source.png"
            save_image(grey(0.5, i), directory / source)
            row |= {"dimension": "change", "source": source}
        rows.append(row)
    path = directory / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_rubric(directory: Path, content: dict) -> str:
    path = directory / f"{content['name']}.yaml"
    path.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    return str(path)


@cache
def toy_files() -> dict[str, str]:
    """Model directory, annotation files and rubric files, made once a session."""
    directory = Path(tempfile.mkdtemp(prefix="toy-vlm-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return {
        "directory": str(directory),
        "model": save_tiny_vlm(directory / "model"),
        "train": write_annotations(directory, "train", 100, seed=1),
        "validation": write_annotations(directory, "validation", 24, seed=2),
        "edits": write_annotations(directory, "edits", 24, seed=3, edits=True),
        "brightness": write_rubric(directory, BRIGHTNESS_RUBRIC),
        "change": write_rubric(directory, CHANGE_RUBRIC),
    }


def toy_module(**changes: object) -> RewardFinetune:
    """A fine-tuning run on the toy files."""
    files = toy_files()
    arguments = {
        "model_path": files["model"],
        "optimizer": partial(torch.optim.AdamW, lr=3e-3),
        "rubrics": {"brightness": files["brightness"], "change": files["change"]},
        "reading": ReadingSettings(max_new_tokens=8),
    } | changes
    return RewardFinetune(**arguments)


def toy_data(**changes: object) -> AnnotationDataModule:
    files = toy_files()
    arguments = {"train_files": [files["train"]], "validation_files": [files["validation"]], "batch_size": 16}
    return AnnotationDataModule(**(arguments | changes))


def toy_trainer(steps: int, directory: Path | None = None, *callbacks: Callback, **changes: object) -> Trainer:
    logger = False if directory is None else TensorBoardLogger(directory, name="", version="", default_hp_metric=False)
    arguments = {
        "accelerator": "cpu",
        "max_steps": steps,
        "logger": logger,
        "callbacks": list(callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "log_every_n_steps": 1,
    } | changes
    return Trainer(**arguments)


@cache
def trained() -> tuple[RewardFinetune, str, dict[str, float]]:
    """A module that has learnt the toy task, its export, and what its validation said, made once a session."""
    directory = Path(toy_files()["directory"])
    module = toy_module(objective=RewardObjective(direct_share=0.5))
    module_trainer = toy_trainer(
        90,
        directory / "run",
        ScoredExamples(per_dimension=3),
        ExportModel(str(directory / "export")),
        limit_val_batches=None,
        val_check_interval=90,
        check_val_every_n_epoch=None,
    )
    module_trainer.fit(module, toy_data())
    found = {name: float(value) for name, value in module_trainer.logged_metrics.items()}
    return module, str(directory / "export"), found
