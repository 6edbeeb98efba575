"""Every shipped config, stacked as its header says, is accepted up to where the trainer would start."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImage21Pipeline

from cli import app
from cli.config_stack import content_of
from demo.making.edit_prompts import write_edits
from demo.scorers.quality import QualityScore
from demo.scorers.verifiers import Verifier
from tests.toy_vlm import toy_files

ROOT = Path(__file__).parents[2]
#: of released models (tests/cli/test_real_configs.py), and what stages include
ELSEWHERE = ("qwen_image_21", "qwen_image", "shared")
CONFIGS = sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name not in ELSEWHERE
)
TEACHER = "configs/demo/t2i_teacher.yaml"
REWARD = "configs/demo/reward.yaml"
EDITS = {
    "configs/demo/edit_teacher.yaml": "data",
    "configs/demo/mix_rl.yaml": "data.edit",
    "configs/demo/student.yaml": "data.edit",
}


@pytest.fixture(scope="module")
def demo_edits(tmp_path_factory) -> dict[str, str]:
    """Edit files that a command makes, two of each split; the configs' 24 an iteration would take seconds to render."""
    directory = tmp_path_factory.mktemp("edits")
    return {split: str(write_edits(directory, split, 2)) for split in ("train", "validation", "test")}


def command_of(config: str) -> tuple[str, list[str]]:
    """Subcommand and stack of the first command in the header; a config without one stacks on the teacher."""
    lines = (ROOT / config).read_text(encoding="utf-8").splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    header = " ".join(line.lstrip("# ").rstrip("\\ ") for line in lines[:end])
    match = re.search(r"train\.py (\w+)((?: --\S+| configs/\S+)+)", header)
    if match is None:
        return "fit", [TEACHER, config]
    return match[1], re.findall(r"--config (\S+)", match[2])


@pytest.mark.parametrize("config", CONFIGS)
def test_config_is_accepted(config, monkeypatch, tiny_path, demo_edits, tmp_path):
    subcommand, stack = command_of(config)
    assert config in stack
    arrived: list[app.FlowCLI] = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["train.py"])
    only = {subcommand: app.FlowCLI.subcommands()[subcommand]}  # the other parsers take time to make
    monkeypatch.setattr(app.FlowCLI, "subcommands", staticmethod(lambda: only))
    monkeypatch.setattr(app.FlowCLI, "_run_subcommand", lambda cli, _subcommand: arrived.append(cli))
    monkeypatch.setattr(Verifier, "load", classmethod(lambda cls, _name: cls(width=8)))
    monkeypatch.setattr(QualityScore, "load", classmethod(lambda cls, _name: cls(width=8)))
    monkeypatch.setattr(QwenImage21Pipeline, "from_pretrained", lambda *_a, **_k: pytest.fail("a model loaded"))
    for name in ("render_scenes", "render_edits"):
        monkeypatch.setattr(f"demo.making.captioned.{name}", lambda *_a, **_k: pytest.fail("scenes were rendered"))
    monkeypatch.setattr("flow_rl.models.vision_language.load_vlm", lambda *_a, **_k: pytest.fail("a model loaded"))
    args = [f"--config={path}" for path in stack]
    paths = [f"--model.model_path={tiny_path}"]
    if REWARD in stack:  # its files are made by a command
        toy = toy_files()
        files = [toy["train"]], [toy["validation"]], [toy["validation"]]
        paths = [f"--model.model_path={toy['model']}", f"--model.rubrics={{'brightness': '{toy['brightness']}'}}"]
        paths += [f"--data.{n}_files={f}" for n, f in zip(("train", "validation", "test"), files, strict=True)]
    for key in [key for path, key in EDITS.items() if path in stack]:
        paths += [f"--{key}.{split}_file={file}" for split, file in demo_edits.items()]
        paths += [f"--{key}.prompts_per_step=2"]
    app.main([subcommand, *args, *paths, f"--run.dir={tmp_path}"])
    assert arrived[0].subcommand == subcommand
    assert (arrived[0].trainer.logger is None) is (subcommand in ("predict", "curate"))  # which log nothing
    if "/optimizer/" in config:  # another optimizer with the rate that the stage has
        made = arrived[0].model.make_optimizer([torch.nn.Parameter(torch.zeros(1))])
        assert made.param_groups[0]["lr"] == 2e-4
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert written == []


def test_every_shared_file_is_included():
    included = {
        os.path.normpath(path.parent / name)
        for path in (ROOT / "configs").rglob("*.yaml")
        for name in included_by(content_of(str(path)))
    }
    assert {str(path) for path in (ROOT / "configs" / "shared").iterdir()} <= included


def included_by(content: Mapping[str, Any]) -> list[str]:
    """The paths that a file includes, relative to it."""
    named = content.get("include", [])
    return [named] if isinstance(named, str) else named


def test_headers_are_read():
    assert command_of("configs/demo/pretrain.yaml") == ("fit", ["configs/demo/pretrain.yaml"])
    assert command_of("configs/demo/test.yaml") == ("test", [TEACHER, "configs/demo/test.yaml"])
    assert command_of("configs/adapter/lora.yaml") == ("fit", [TEACHER, "configs/adapter/lora.yaml"])
