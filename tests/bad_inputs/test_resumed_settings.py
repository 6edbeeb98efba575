"""Resuming under other settings: what would train something else is refused at once, the rest is named and allowed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cli.resumed_settings import RULES, check_resumed, differences
from cli.settings_record import FINGERPRINT, record_of
from flow_rl.errors import SettingError
from lightning_modules import DistillationStudent, FlowPretrain, GRPOPolicy, RewardFinetune

ROOT = Path(__file__).parents[2]
SCHEDULE = {"class_path": "torch.optim.lr_scheduler.LinearLR", "init_args": {"total_iters": 9}}
#: settings of a run of any stage; each test changes some
SETTINGS = {
    "seed_everything": 0,
    "run": {"dir": "runs", "name": "a", "seed": 0, "threads": 1, "tf32": False},
    "model": {
        "class_path": "lightning_modules.Any",
        "init_args": {
            "model_path": "base",
            "seed": 0,
            "lora": None,
            "dtype": "float32",
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3, "betas": [0.9, 0.99]}},
            "lr_scheduler": None,
            "gradient_clip": 1.0,
            "train_vision": True,
            "rollout": {"num_steps": 5, "group_size": 4, "batch_size": 96},
            "objective": {"class_path": "objectives.NFT", "init_args": {"updates": 1, "micro_batch_size": 8}},
            "distillation": {"num_states": 2, "micro_batch_size": 8},
            "rewards": {"good": {"class_path": "rewards.Good", "init_args": {"url": "http://a", "scale": 2}}},
            "reward_weights": {"good": 1.0},
            "teachers": {"t2i": {"path": None, "guidance": {"scale": 2.0}}},
            "judges": {},
            "reading": {"batch_size": 4},
            "val_guidances": [1.0],
        },
    },
    "data": {
        "class_path": "datamodules.Any",
        "init_args": {"train_file": "train.jsonl", "test_file": "test.jsonl", "prompts_per_step": 8, "seed": 0},
    },
    "trainer": {"max_steps": 4, "precision": "32-true", "accumulate_grad_batches": 1, "logger": {"name": "a"}},
    "callbacks": {
        "ema": {"class_path": "callbacks.WeightEMA", "init_args": {"decay": 0.9}},
        "timer": {"class_path": "callbacks.PhaseTimer", "init_args": {"every": 1}},
        "export": {"class_path": "callbacks.ExportModel", "init_args": {"directory": "runs/a/export"}},
        "monitor": None,
    },
}


def changed(**changes: object) -> dict:
    """The settings, some changed; `__` leads into a section, `init_args` is left out."""
    settings = json.loads(json.dumps(SETTINGS))
    for place, value in changes.items():
        *sections, name = place.split("__")
        inner = settings
        for section in sections:
            inner = inner[section]
            inner = inner.get("init_args", inner)
        inner[name] = value
    return settings


def record(**changes: object) -> dict:
    return record_of(changed(**changes), torch.nn.Module())


FOREIGN = {"class_path": "somebody.Watches", "init_args": {}}
FILTER = {"class_path": "callbacks.RewardRangeFilter", "init_args": {"threshold": 0.5}}
#: one change, and words of the message
REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "seed": ({"run__seed": 7, "seed_everything": 7, "model__seed": 7, "data__seed": 7}, "run.seed was 0 and is 7"),
    "seed of the data alone": ({"data__seed": 7}, "data.seed was 0 and is 7"),
    "stage": ({"model": {"class_path": "lightning_modules.Other", "init_args": {}}}, "model was 'lightning_modules"),
    "base": ({"model__model_path": "other"}, "model.model_path was 'base' and is 'other'"),
    "adapter": ({"model__lora": {"rank": 4}}, 'model.lora was null and is {"rank": 4}'),
    "number format": ({"model__dtype": "bfloat16"}, "another number format"),
    "precision": ({"trainer__precision": "bf16-mixed"}, "trainer.precision was '32-true' and is 'bf16-mixed'"),
    "group size": ({"model__rollout__group_size": 8}, "model.rollout.group_size was 4 and is 8"),
    "steps": ({"model__rollout__num_steps": 6}, "model.rollout.num_steps was 5 and is 6"),
    "objective": (
        {"model__objective": {"class_path": "objectives.Clipped", "init_args": {"updates": 2}}},
        "model.objective was 'objectives.NFT' and is 'objectives.Clipped'",
    ),
    "updates": ({"model__objective__updates": 2}, "model.objective.updates was 1 and is 2"),
    "frozen part": ({"model__train_vision": False}, "model.train_vision was true and is false"),
    "states": ({"model__distillation__num_states": None}, "model.distillation.num_states was 2 and is null"),
    "teacher": ({"model__teachers__t2i__guidance__scale": 3.0}, "model.teachers.t2i.guidance.scale was 2.0"),
    "another teacher": ({"model__teachers__edit": {"path": "x"}}, "model.teachers.edit was not set"),
    "reward added": ({"model__rewards__more": {"class_path": "rewards.More"}}, "model.rewards.more was not set"),
    "reward removed": ({"model__rewards": {}}, "model.rewards.good was 'rewards.Good' and is not set"),
    "reward's setting": ({"model__rewards__good__scale": 3}, "model.rewards.good.scale was 2 and is 3"),
    "weights": ({"model__reward_weights__good": 0.5}, "model.reward_weights.good was 1.0 and is 0.5"),
    "optimizer": (
        {"model__optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1e-3}}},
        "model.optimizer was 'torch.optim.AdamW' and is 'torch.optim.SGD'",
    ),
    "schedule": ({"model__lr_scheduler": SCHEDULE}, "model.lr_scheduler was null and is 'torch.optim.lr_sch"),
    "training file": ({"data__train_file": "more.jsonl"}, "data.train_file was 'train.jsonl' and is 'more.jsonl'"),
    "prompts of a step": ({"data__prompts_per_step": 4}, "data.prompts_per_step was 8 and is 4"),
    "rows in use": ({"data__max_train": 4, "data__prompts_per_step": 4}, "prompts_per_step"),
    "accumulation": ({"trainer__accumulate_grad_batches": 2}, "trainer.accumulate_grad_batches was 1 and is 2"),
    "average": ({"callbacks__ema__decay": 0.5}, "callbacks.ema.decay was 0.9 and is 0.5"),
    "average taken out": ({"callbacks__ema": None}, "callbacks.ema was 'callbacks.WeightEMA' and is null"),
    "filter": ({"callbacks__filter": FILTER}, "callbacks.filter was not set and is 'callbacks.RewardRangeFilter'"),
    "filter in a list": ({"trainer__callbacks": [FILTER]}, "trainer.callbacks.RewardRangeFilter was not set"),
}  # fmt: skip
#: one change that is named in the log
ALLOWED: dict[str, dict[str, object]] = {
    "model.optimizer.lr was 0.001 and is 0.1": {"model__optimizer__lr": 0.1},
    "model.optimizer.betas was [0.9, 0.99] and is [0.5, 0.9]": {"model__optimizer__betas": [0.5, 0.9]},
    "model.gradient_clip was 1.0 and is 2.0": {"model__gradient_clip": 2.0},
    "model.objective.micro_batch_size was 8 and is 4": {"model__objective__micro_batch_size": 4},
    "model.distillation.micro_batch_size was 8 and is 4": {"model__distillation__micro_batch_size": 4},
    "model.rollout.batch_size was 96 and is 48": {"model__rollout__batch_size": 48},
    "model.judges.some was not set": {"model__judges__some": {"class_path": "rewards.Good"}},
    "model.reading.batch_size was 4 and is 8": {"model__reading__batch_size": 8},
    "model.brand_new was not set and is 3": {"model__brand_new": 3},
    "data.test_file was 'test.jsonl' and is 'x.jsonl'": {"data__test_file": "x.jsonl"},
    "trainer.max_steps was 4 and is 9": {"trainer__max_steps": 9},
    "callbacks.timer.every was 1 and is 2": {"callbacks__timer__every": 2},
    "callbacks.timer was 'callbacks.PhaseTimer' and is null": {"callbacks__timer": None},
    "callbacks.monitor was null and is 'somebody.Watches'": {"callbacks__monitor": FOREIGN},
    "trainer.callbacks.Watches was not set": {"trainer__callbacks": [FOREIGN]},
    "run.name was 'a' and is 'b'": {
        "run__name": "b",
        "trainer__logger__name": "b",
        "callbacks__export__directory": "runs/b/export",
    },
}
MODULES = (GRPOPolicy, DistillationStudent, RewardFinetune, FlowPretrain)


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_train_something_else_is_refused(name: str) -> None:
    changes, words = REFUSED[name]
    for module in MODULES:
        if name.startswith("reward") and module is DistillationStudent:
            continue
        with pytest.raises(SettingError, match=re.escape(words)) as error:
            check_resumed(record(), record(**changes), "runs/a/last.ckpt", module=module)
        text = str(error.value)
        assert "'runs/a/last.ckpt'" in text
        assert "Set them back" in text
        assert "--model.model_path" in text
    if name == "seed":  # what follows from run.seed is not listed beside it
        assert "2. " not in text


@pytest.mark.parametrize("words", ALLOWED)
def test_what_may_change_is_named_alone(words: str) -> None:
    for module in MODULES:
        said = check_resumed(record(), record(**ALLOWED[words]), "a.ckpt", module=module)
        assert said.startswith("Resuming 'a.ckpt' under settings that have changed: " + words)
        assert ";" not in said


def test_nothing_changed_says_nothing() -> None:
    assert check_resumed(record(), record(), "a.ckpt", module=GRPOPolicy) is None


def test_every_difference_is_named_at_once() -> None:
    now = record(model__seed=1, data__train_file="b", model__rollout__group_size=8, trainer__max_steps=7)
    with pytest.raises(SettingError) as error:
        check_resumed(record(), now, "a.ckpt", module=GRPOPolicy)
    text = str(error.value)
    assert [f"  {n}. " in text for n in (1, 2, 3, 4)] == [True] * 3 + [False]
    assert all(name in text for name in ("model.seed", "data.train_file", "model.rollout.group_size"))


def test_rewards_of_a_student_are_only_looked_at() -> None:
    now = record(model__rewards__more={"class_path": "rewards.More"})
    assert "model.rewards.more" in check_resumed(record(), now, "a.ckpt", module=DistillationStudent)


@pytest.mark.parametrize("change", [{"model__optimizer__lr": 0.1}, {"model__lr_scheduler__total_iters": 5}])
def test_a_schedule_keeps_its_rate(change: dict[str, object]) -> None:
    """It resumes from its own state, which would silently win over what is asked for."""
    before = changed(model__lr_scheduler=SCHEDULE)
    now = json.loads(json.dumps(before))
    [(place, value)] = change.items()
    now["model"]["init_args"][place.split("__")[1]]["init_args"][place.split("__")[2]] = value
    records = [record_of(settings, torch.nn.Module()) for settings in (before, now)]
    with pytest.raises(SettingError, match="would be ignored"):
        check_resumed(*records, "a.ckpt", module=RewardFinetune)


def test_a_reward_that_scores_the_same_may_be_asked_elsewhere() -> None:
    before, now = record(), record(model__rewards__good__url="http://b")
    for one in (before, now):
        one[f"{FINGERPRINT}good"] = "abc"
    assert "http://b" in check_resumed(before, now, "a.ckpt", module=GRPOPolicy)
    now[f"{FINGERPRINT}good"] = "other"
    with pytest.raises(SettingError, match=r"model\.rewards\.good\.url was 'http://a'"):
        check_resumed(before, now, "a.ckpt", module=GRPOPolicy)
    same = record() | {f"{FINGERPRINT}good": "other"}
    with pytest.raises(SettingError, match=r"fingerprint of model\.rewards\.good was 'abc' and is 'other'"):
        check_resumed(before, same, "a.ckpt", module=GRPOPolicy)


def file(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8")
    return str(path)


def folder(path: Path, value: str) -> str:
    path.mkdir()
    save_file({"w": torch.full((4,), float(value))}, path / "model.safetensors")
    return str(path)


@pytest.mark.parametrize(("make", "place"), [(file, "data__train_file"), (folder, "model__model_path")])
def test_content_counts_and_not_its_place(make: Callable[[Path, str], str], place: str, tmp_path: Path) -> None:
    before = record(**{place: make(tmp_path / "a", "1")})
    moved, other = record(**{place: make(tmp_path / "b", "1")}), record(**{place: make(tmp_path / "c", "2")})
    assert differences(before, moved, module=GRPOPolicy) == []
    shutil.rmtree(tmp_path / "a", ignore_errors=True)
    (tmp_path / "a").unlink(missing_ok=True)
    changed_there = record(**{place: make(tmp_path / "a", "3")})
    for now in (other, changed_there):
        with pytest.raises(SettingError, match=place.replace("__", r"\.") + r".* \(content .*\) and is"):
            check_resumed(before, now, "a.ckpt", module=GRPOPolicy)


def test_docs_say_what_the_table_says() -> None:
    rows = re.findall(r"^\| (`.+?) \| (refused|allowed) \|", (ROOT / "docs" / "resuming.md").read_text(), re.MULTILINE)
    documented = [(tuple(re.findall(r"`([^`]+)`", names)), verdict == "refused") for names, verdict in rows]
    assert documented == [(rule.settings, rule.refused) for rule in RULES]
