"""Planted misconfigurations of a real run: each is refused, with a message that says what to change."""

from __future__ import annotations

import os

import pytest
import torch

from cli import app
from cli.doctor import _nothing_compiled
from tests.cli.real_runs import ROOT, write_data

RUN = "--config=configs/qwen_image_21/grpo_t2i.yaml"
EDIT = "--config=configs/qwen_image_21/grpo_edit.yaml"

#: what is planted, and words of the message: the setting, and what to do about it
PLANTED = {
    "misspelt setting": (["--model.rollout.gruop_size=8"], "Did you mean 'group_size'"),
    "wrong type": (["--model.image_size=large"], "model.image_size must be an integer, received 'large'"),
    "reward of another task": (
        [
            "--model.rewards.alignment=flow_rl.rewards.openai.OpenAIReward",
            "--model.rewards.alignment.url=http://rewards-0:8000/v1",
            "--model.rewards.alignment.model=judge",
            "--model.rewards.alignment.rubric=instruction_following",
        ],
        "judges edits, but is asked",
    ),
    "missing prompts": (["--data.train_file=data/nowhere.jsonl"], "data/nowhere.jsonl"),
    "unknown model": (["--model.model_path=Qwen/Qwen-Image2.1"], "Did you mean 'Qwen/Qwen-Image-2.1'"),
    "geometry": (["--model.image_size=500"], "must be multiples of 32 pixels"),
    "weights off 1": (['--model.reward_weights={"alignment": 0.5, "aesthetic": 0.3, "portrait": 0.3}'], "sum to 1"),
    "unknown reward": (
        ['--model.reward_weights={"alignmnt": 0.5, "aesthetic": 0.3, "portrait": 0.2}'], "Did you mean 'alignment'",
    ),
    "stochastic nft": (["--model.objective=flow_rl.rl.objectives.NFT"], "Set it to 'ode'"),
    "gradient without noise": (["--model.rollout.transition=ode"], "Choose flow_sde, cps or dance"),
    "guidance ignored": (["--model.rollout.guidance.scale=2"], "Set guidance.scale to 1, or cfg to 'rollout_only'"),
    "guidance of another family": (
        ["--model.rollout.guidance.scale=4", "--model.rollout.cfg=rollout_only"],
        "out of range for Qwen/Qwen-Image-2.1",
    ),
    "window too large": (["--model.rollout.window.count=30"], "Set count between 1 and 16"),
    "group of one": (["--model.rollout.group_size=1"], "it must be at least 2"),
    "indivisible groups": (["--data.prompts_per_step=20"], "8 ranks cannot share evenly. Set it to"),
    "more groups than prompts": (["--data.prompts_per_step=64"], "has 32 prompts"),
    "float16": (["--trainer.precision=16-mixed"], "Use 32-true"),
    "bfloat16 weights": (["--trainer.precision=bf16-true"], "Set it to 32-true"),
    "accumulation twice": (["--trainer.accumulate_grad_batches=4"], "Set model.objective.micro_batch_size"),
    "no sharding": (["--trainer.strategy=auto"], "Set trainer.strategy to one that shards"),
    "8 bits on shards": (
        ["--model.optimizer=bitsandbytes.optim.AdamW8bit", "--model.optimizer.init_args.lr=1e-5"],
        "Use torch.optim.AdamW",
    ),
    "half an iteration": (["--model.objective.updates=2", "--trainer.max_steps=501"], "multiple of 2, such as 500"),
    "average that stays the base": (
        ["--trainer.max_steps=100"], "28% of the average (EMA) of the weights would be what they were before",
    ),
    "stream that starts over": (["--trainer.limit_train_batches=5"], "for a shorter run, and data.max_train for"),
    "rescaled guidance": (
        ["--model.rollout.guidance.rescale=true", "--model.rollout.guidance.scale=2", "--model.rollout.cfg=both"],
        "Set it to false",
    ),
    "does not fit": (["--device=RTX4090"], "--fit 8xRTX4090 proposes"),
    "unknown device": (["--device=H100"], "Did you mean 'H100-80GB'"),
    "unshareable fit": (["--fit=5xH100-80GB"], "4 devices can"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def _large_disk(monkeypatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 10**15}))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[bool, list[str]]:
    return {edit: write_data(tmp_path_factory.mktemp(f"edit{edit}"), edit=edit) for edit in (False, True)}


def refusal(capsys, *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        app.main(["doctor", *args])
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.usefixtures("_large_disk")
@pytest.mark.parametrize("name", PLANTED)
def test_refused(name, files, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *_a, **_k: pytest.fail("a model loaded"))
    settings, words = PLANTED[name]
    assert words in refusal(capsys, RUN, *files[False], f"--run.dir={tmp_path}", *settings)


@pytest.mark.usefixtures("_large_disk")
def test_refused_for_edits(files, tmp_path, capsys) -> None:
    given = [EDIT, *files[True], f"--run.dir={tmp_path}"]
    assert "Set both alike" in refusal(capsys, *given, "--data.image_size=256")
    other = ["--model.model_path=Qwen/Qwen-Image", "--model.rollout.guidance.rescale=true"]
    assert "set model.model_path to Qwen/Qwen-Image-Edit-2509" in refusal(capsys, *given, *other)


def test_full_disk(files, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 10**10}))
    with pytest.raises(SystemExit):
        app.main(["doctor", RUN, *files[False], f"--run.dir={tmp_path}"])
    shown = capsys.readouterr()
    assert "has 10 GB free. Set --run.dir to a larger disk" in shown.err
    assert "at the fullest" in shown.out  # the plan is seen on a small machine as well


@pytest.mark.usefixtures("_large_disk")
@pytest.mark.parametrize("config", [RUN, EDIT])
def test_plan_without_data(config, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        app.main(["doctor", config, f"--run.dir={tmp_path}"])
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert "at the fullest" in shown.out
    for split in ("train", "validation", "test"):
        assert f"data.{split}_file: No file 'data/" in shown.err


@pytest.mark.usefixtures("_large_disk")
def test_everything_wrong_is_said_at_once(files, tmp_path, capsys) -> None:
    wrong = ["--trainer.precision=bf16-true", "--data.prompts_per_step=20"]
    message = refusal(capsys, RUN, *files[False], f"--run.dir={tmp_path}", *wrong)
    assert "1. data.prompts_per_step" in message
    assert "2. trainer.precision" in message


def test_nothing_is_compiled_while_the_doctor_looks(monkeypatch) -> None:
    for before in (None, "0"):
        monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
        if before is not None:
            monkeypatch.setenv("TORCHDYNAMO_DISABLE", before)
        with _nothing_compiled():
            function = torch.compile(torch.sin, backend=lambda *_: pytest.fail("compiled"))
            assert function(torch.zeros(2)).sum() == 0
        assert os.environ.get("TORCHDYNAMO_DISABLE") == before
