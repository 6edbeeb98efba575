"""A run resumes bit for bit where its files have moved, and not as another run."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import QwenImage21Pipeline

from cli import app
from tests.cli.command_lines import complaint

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fit(
    only_fit: None, tmp_path: Path, tiny_path: str, prompt_files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    monkeypatch.chdir(ROOT)
    return [
        "fit",
        "--config=configs/demo/t2i_teacher.yaml",
        f"--model.model_path={tiny_path}",
        "--model.rewards={brightness: {class_path: tests.planted.Brightness}}",
        "--model.reward_weights={brightness: 1.0}",
        *(f"--data.{name}={path}" for name, path in prompt_files.items()),
        "--data.prompts_per_step=2",
        "--model.rollout.num_steps=3",
        f"--run.dir={tmp_path}",
        "--trainer.limit_val_batches=0",
        "--callbacks.checkpoint.every_n_train_steps=1",
        "--callbacks.checkpoint.save_top_k=-1",
        "--trainer.max_steps=2",
        "--callbacks.monitor=null",
        "--callbacks.probe=null",
        "--callbacks.ema=null",
        "--callbacks.progress=null",
        "--trainer.enable_progress_bar=false",
    ]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return QwenImage21Pipeline.from_pretrained(path).transformer.state_dict()


def test_a_run_resumes_elsewhere_bit_for_bit_and_not_as_another(
    fit: list[str], tmp_path: Path, prompt_files: dict[str, str], capsys, caplog
) -> None:
    app.main([*fit, "--run.name=whole"])
    first = tmp_path / "whole" / "checkpoints" / "epoch=0-step=1.ckpt"
    again = [*fit, "--run.name=half", f"--ckpt_path={first}"]
    capsys.readouterr()
    text = complaint(capsys, [*again, "--run.seed=5", "--data.prompts_per_step=4"])
    assert "run.seed was 0 and is 5" in text
    assert "data.prompts_per_step was 2 and is 4" in text
    moved = shutil.copy(prompt_files["train_file"], tmp_path / "moved.jsonl")
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    app.main([*again, f"--data.train_file={moved}", "--trainer.log_every_n_steps=2"])
    [named] = [m.partition("changed: ")[2] for m in caplog.messages if "settings that have changed" in m]
    assert sorted(named.rstrip(".").split("; ")) == [
        "run.name was 'whole' and is 'half'",
        "trainer.log_every_n_steps was 1 and is 2",
    ]
    whole, half = (weights(tmp_path / name / "export") for name in ("whole", "half"))
    assert all(torch.equal(whole[name], half[name]) for name in whole)
