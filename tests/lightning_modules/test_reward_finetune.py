"""Reward models in training: learning, resuming, adapters, exports, and what is refused."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import bitsandbytes
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForImageTextToText, AutoProcessor

from datamodules import PreferenceDataModule
from flow_rl.models.adapters import LoraSettings
from flow_rl.models.vision_language import load_vlm
from flow_rl.rewards.finetune_settings import RewardObjective
from flow_rl.rewards.reading import ReadingSettings
from flow_rl.rewards.readout import nearest_digit
from tests.toy_vlm import rubric, toy_data, toy_files, toy_module, toy_trainer, trained

LORA = LoraSettings(rank=4, alpha=8)
DIRECT = {"objective": RewardObjective(direct_share=1.0), "reading": ReadingSettings(reasoning=False)}


def weights(module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in module.model.named_parameters() if p.requires_grad}


def pairs(**changes) -> PreferenceDataModule:
    files = toy_files()
    arguments = {"train_files": [files["train"]], "validation_files": [files["validation"]], "batch_size": 8}
    return PreferenceDataModule(**(arguments | changes))


def test_pointwise_training_learns_the_scores_and_to_reason() -> None:
    module, _, found = trained()
    # guessing the middle has an error of 2, and orders half of the pairs right
    assert found["val/brightness/mse"] < 0.6
    assert found["val/brightness/srcc"] > 0.85
    assert found["val/brightness/pairwise_accuracy"] > 0.9
    assert found["val/brightness/parse_rate"] == 1.0
    assert module.validation["brightness"]["srcc"] == pytest.approx(found["val/brightness/srcc"])
    assert "change" not in module.validation  # no data of it


def test_validation_is_what_a_user_looks_at_in_tensorboard() -> None:
    trained()
    events = EventAccumulator(str(Path(toy_files()["directory"]) / "run"), size_guidance={"images": 0}).Reload()
    scalars = set(events.Tags()["scalars"])
    assert {
        "loss", "train/cross_entropy", "train/squared_error", "train/outside_mass", "val/brightness/srcc",
        "val/brightness/plcc", "val/brightness/mse", "val/brightness/pairwise_accuracy",
        "val/brightness/pairwise_accuracy_ties", "val/brightness/calibration_error",
        "val/brightness/identical_in_group", "val/brightness/parse_rate", "val/mean/srcc",
    } <= scalars  # fmt: skip
    assert {"scored/brightness", "reliability/brightness"} <= set(events.Tags()["images"])
    table = events.Tensors("scored/brightness/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| # | prompt | reasoning | score | truth |" in table
    assert len(table.splitlines()) == 2 + 3


def test_export_loads_in_plain_transformers_with_its_spec_beside() -> None:
    module, path, found = trained()
    model = AutoModelForImageTextToText.from_pretrained(path)
    processor = AutoProcessor.from_pretrained(path)
    assert type(processor) is type(module.processor)
    expected = module.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    spec = json.loads((Path(path) / "reward.json").read_text())
    assert spec["rubrics"]["brightness"]["hash"] == rubric().hash
    assert spec["rubrics"]["brightness"]["text"] == rubric().text
    assert spec["validation"]["brightness"]["srcc"] == pytest.approx(found["val/brightness/srcc"])
    assert [processor.tokenizer.decode([t]) for t in spec["readout"]["digit_token_ids"]] == list("12345")


def test_pairwise_training_orders_the_pairs(tmp_path) -> None:
    module = toy_module(**DIRECT | {"objective": RewardObjective(kind="pairwise", direct_share=1.0)})
    data = pairs(batch_size=16)
    trainer = toy_trainer(25, tmp_path)
    trainer.fit(module, data)
    result = toy_trainer(1, limit_val_batches=None).validate(module, data, verbose=False)[0]
    assert result["val/brightness/pairwise_accuracy"] > 0.75
    assert result["val/brightness/parse_rate"] == 1.0  # digits are still what it writes


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4, alpha=8, dropout=0.1)])
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, lora) -> None:
    def run(directory: Path, steps: int, checkpoint: str | None):
        module = toy_module(objective=RewardObjective(direct_share=0.5), lora=lora)
        saver = ModelCheckpoint(dirpath=directory, every_n_train_steps=2, save_last="link")
        toy_trainer(steps, None, saver).fit(module, toy_data(batch_size=4), ckpt_path=checkpoint)
        return weights(module)

    whole = run(tmp_path / "whole", 4, None)
    half = run(tmp_path / "parts", 2, None)
    resumed = run(tmp_path / "parts", 4, str(tmp_path / "parts" / "last.ckpt"))
    assert any(not torch.equal(whole[name], half[name]) for name in whole)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_adapter_trains_alone_and_is_merged_on_export(tmp_path, quantization: str) -> None:
    module = toy_module(
        objective=RewardObjective(direct_share=1.0),
        reading=ReadingSettings(reasoning=False, max_outside=1.0),
        lora=LORA,
        quantization=quantization,
        optimizer=partial(bitsandbytes.optim.AdamW8bit, lr=1e-2),
        gradient_checkpointing=True,
    )
    module.configure_model()
    quantised = [m for m in module.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert bool(quantised) is (quantization == "nf4")
    frozen = {n: p.clone() for n, p in module.model.named_parameters() if not p.requires_grad}
    assert all("lora_" in name for name in weights(module))
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1)
    toy_trainer(2, None, saver).fit(module, toy_data(batch_size=4))
    assert all(torch.equal(p, frozen[n]) for n, p in module.model.named_parameters() if n in frozen)
    moved = [p.abs().max() for n, p in module.model.named_parameters() if "lora_B" in n]
    assert all(m > 0 for m in moved)
    state = torch.load(next(tmp_path.glob("*.ckpt")), weights_only=True)["state_dict"]
    assert state.keys() == {f"model.{name}" for name in weights(module)}

    module.export(tmp_path / "export")
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "export")
    assert not any("lora" in name or "quant" in name for name in plain.state_dict())
    assert not hasattr(plain.config, "quantization_config")
    loaded = [a.load() for a in toy_data().validation[:6]]
    asked = module.questions(loaded)
    expected = module.reader.read(asked)
    module.reader.model = plain
    found = module.reader.read(asked)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=0)
    module.reader.model = load_vlm(module.model_path)[0]
    assert (module.reader.read(asked).scores - found.scores).abs().max() > 1e-3


def test_frozen_vision_tower_stays(tmp_path) -> None:
    module = toy_module(**DIRECT, train_vision=False)
    module.configure_model()
    before = {n: p.clone() for n, p in module.model.named_parameters()}
    toy_trainer(1).fit(module, toy_data(batch_size=4))
    changed = {n for n, p in module.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert not any("visual" in name for name in changed)


def test_test_writes_every_score(tmp_path) -> None:
    module, _, _ = trained()
    toy_trainer(1, tmp_path).test(module, toy_data(), verbose=False)
    rows = [json.loads(line) for line in (tmp_path / "test_scores.jsonl").read_text().splitlines()]
    assert [r["id"] for r in rows] == list(range(24))
    assert all(1 <= r["score"] <= 5 and r["dimension"] == "brightness" and r["reasoning"] for r in rows)


def test_checkpoint_of_other_settings_is_refused(tmp_path) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1)
    toy_trainer(1, None, saver).fit(toy_module(**DIRECT, lora=LORA), toy_data(batch_size=4))
    with pytest.raises(ValueError, match="trained with an adapter of rank 4 and alpha 8, and this run has no adapter"):
        toy_trainer(2).fit(toy_module(**DIRECT), toy_data(batch_size=4), ckpt_path=str(next(tmp_path.glob("*.ckpt"))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_path": "nowhere"}, "No model directory"),
        ({"quantization": "nf4"}, "4-bit weights can't be trained: set model.lora"),
        ({"dtype": "bfloat16"}, "small updates would be rounded away"),
        ({"rubrics": {}}, "model.rubrics is empty"),
        ({"rubrics": {"brightness": "alignmnt"}}, "Did you mean 'alignment'"),
        ({"reading": ReadingSettings(reasoning=False)}, "no answer without reasoning is ever trained"),
        ({"objective": RewardObjective(direct_share=1.0)}, "no reasoning is ever trained"),
        ({"optimizer": partial(torch.optim.AdamW, lr=-1.0)}, "Invalid learning rate"),
        ({"gradient_clip": 0.0}, "model.gradient_clip is 0.0"),
    ],
)
def test_bad_settings_end_before_a_model_loads(monkeypatch, changes: dict, message: str) -> None:
    monkeypatch.setattr("lightning_modules.reward_finetune.load_vlm", lambda *_a, **_k: pytest.fail("a model loaded"))
    with pytest.raises(ValueError, match=message):
        toy_module(**changes)


@pytest.mark.parametrize(
    ("module", "data", "message"),
    [
        (
            {"rubrics": {"alignment": "alignment"}},
            {},
            "The data judge brightness, for which model.rubrics has no entry",
        ),
        ({"objective": RewardObjective(kind="pairwise")}, {}, "use a PreferenceDataModule"),
    ],
)
def test_data_that_do_not_fit_end_before_a_model_loads(monkeypatch, module: dict, data: dict, message: str) -> None:
    monkeypatch.setattr("lightning_modules.reward_finetune.load_vlm", lambda *_a, **_k: pytest.fail("a model loaded"))
    with pytest.raises(ValueError, match=message):
        toy_trainer(1).fit(toy_module(**module), toy_data(**data))


@pytest.mark.parametrize(
    "values", [{"regression": -1.0}, {"cross_entropy": 0.0, "regression": 0.0}, {"direct_share": 2}]
)
def test_bad_objective_is_refused(values: dict) -> None:
    with pytest.raises(ValueError, match=r"model\.objective"):
        RewardObjective(**values)


def test_nearest_digit() -> None:
    assert [nearest_digit(s) for s in (1.0, 1.49, 1.5, 3.5, 4.4, 5.0)] == [1, 1, 2, 4, 4, 5]
