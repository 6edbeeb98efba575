"""Every shipped config, stacked as its header says, is accepted up to where the trainer would start."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import QwenImage21Pipeline
from transformers import AutoProcessor

from cli import app
from cli.config_stack import content_of
from demo.making.edit_prompts import write_edits
from flow_rl.files import replacing
from flow_rl.rewards.reading import ReadingSettings
from flow_rl.rewards.readout import digit_token_ids
from flow_rl.rewards.rubrics import Rubric
from flow_rl.rewards.spec import RewardSpec
from tests.cli.conftest import no_scorer_weights
from tests.toy_vlm import toy_files

ROOT = Path(__file__).parents[2]
#: of released models (tests/cli/test_real_configs.py), and what stages include
ELSEWHERE = ("qwen_image_21", "qwen_image", "shared")
CONFIGS = sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name not in ELSEWHERE
)
TEACHER = "configs/demo/t2i_teacher.yaml"
REWARD = "configs/demo/reward.yaml"
VERIFIERS = "configs/demo/verifier_rewards.yaml"
EDITS = {
    "configs/demo/edit_teacher.yaml": "data",
    "configs/demo/mix_rl.yaml": "data.edit",
    "configs/demo/student.yaml": "data.edit",
}


DIMENSIONS = ("alignment", "aesthetic", "portrait", "instruction_following")
WEIGHTS = {
    "t2i_teacher": {"alignment": 0.6, "aesthetic": 0.2, "portrait": 0.2},
    "edit_teacher": {"instruction_following": 0.7, "face_identity": 0.3},
}


@pytest.fixture(scope="module")
def demo_edits(tmp_path_factory) -> dict[str, str]:
    """Edit files that a command makes, two of each split; the configs' 24 an iteration would take seconds to render."""
    directory = tmp_path_factory.mktemp("edits")
    return {split: str(write_edits(directory, split, 2)) for split in ("train", "validation", "test")}


@pytest.fixture(scope="module")
def reward_run(tmp_path_factory) -> Path:
    """A run directory with the export of a reward model, untrained: the rewards that configs name can be built."""
    directory = tmp_path_factory.mktemp("reward")
    rubrics = {name: Rubric.load(str(ROOT / "demo" / "rubrics" / f"{name}.yaml")) for name in DIMENSIONS}
    with replacing(directory / "reward" / "export") as export:
        shutil.copytree(toy_files()["model"], export, dirs_exist_ok=True)
        digits = digit_token_ids(AutoProcessor.from_pretrained(export).tokenizer)
        spec = RewardSpec(rubrics=rubrics, reading=ReadingSettings(), digit_token_ids=digits, validation={}, base="toy")
        spec.write(export)
    return directory


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
def test_config_is_accepted(config, monkeypatch, tiny_path, demo_edits, reward_run, tmp_path):
    subcommand, stack = command_of(config)
    assert config in stack
    arrived: list[app.FlowCLI] = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["train.py"])
    only = {subcommand: app.FlowCLI.subcommands()[subcommand]}  # the other parsers take time to make
    monkeypatch.setattr(app.FlowCLI, "subcommands", staticmethod(lambda: only))
    monkeypatch.setattr(app.FlowCLI, "_run_subcommand", lambda cli, _subcommand: arrived.append(cli))
    no_scorer_weights(monkeypatch)
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
    (tmp_path / "reward").symlink_to(reward_run / "reward")
    (tmp_path / "curation").mkdir()
    for name, row in WEIGHTS.items():  # made by a command
        text = yaml.safe_dump({"default": row})
        (tmp_path / "curation" / f"{name}_weights.yaml").write_text(text, encoding="utf-8")
    app.main([subcommand, *args, *paths, f"--run.dir={tmp_path}"])
    assert arrived[0].subcommand == subcommand
    assert (arrived[0].trainer.logger is None) is (subcommand in ("predict", "curate"))  # which log nothing
    if "/optimizer/" in config:  # another optimizer with the rate that the stage has
        made = arrived[0].model.make_optimizer([torch.nn.Parameter(torch.zeros(1))])
        assert made.param_groups[0]["lr"] == 5e-5
    made = tmp_path / "reward", tmp_path / "curation"
    written = [p for p in tmp_path.rglob("*") if p.is_file() and not any(m in p.parents for m in made)]
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
    assert command_of("configs/demo/test.yaml") == ("test", [TEACHER, VERIFIERS, "configs/demo/test.yaml"])
    assert command_of("configs/adapter/lora.yaml") == ("fit", [TEACHER, "configs/adapter/lora.yaml"])
