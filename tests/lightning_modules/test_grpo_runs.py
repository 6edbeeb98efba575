"""Whole runs of a few iterations: learning, resuming, adapters, faults."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from callbacks import ExportModel, ImageWriter, PhaseTimer, SampleGrids, TensorBoardLayout, UpdateProbe, WeightEMA
from flow_rl.models import load_image_model
from flow_rl.models.adapters import LoraSettings
from tests.planted import Broken
from tests.toy_policy import toy_rollout


def trainer(directory: Path, steps: int, *callbacks, **changes) -> Trainer:
    arguments = {
        "accelerator": "cpu",
        "max_steps": steps,
        "callbacks": list(callbacks),
        "logger": TensorBoardLogger(directory, name="", version="", default_hp_metric=False),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
    } | changes
    return Trainer(**arguments)


def weights(module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in module.model.transformer.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("kind", "lora"), [("nft", None), ("clipped", LoraSettings(rank=4, alpha=8))])
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(policy, data, tmp_path, kind, lora) -> None:
    def run(directory: Path, steps: int, checkpoint: str | None):
        module = policy(kind, objective={"updates": 2}, lora=lora)
        ema = WeightEMA(decay=0.7)
        saver = ModelCheckpoint(dirpath=directory, every_n_train_steps=4, save_last="link")
        trainer(directory, steps, ema, saver).fit(module, data(), ckpt_path=checkpoint)
        return module, ema

    whole, whole_ema = run(tmp_path / "whole", 8, None)
    run(tmp_path / "parts", 4, None)
    resumed, resumed_ema = run(tmp_path / "parts", 8, str(tmp_path / "parts" / "last.ckpt"))
    assert resumed.iteration == whole.iteration == 4
    pairs = [(weights(whole), weights(resumed)), (whole_ema.shadow.state_dict(), resumed_ema.shadow.state_dict())]
    if whole.old is not None:
        pairs.append((whole.old.state_dict(), resumed.old.state_dict()))
    for expected, found in pairs:
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_checkpoint_holds_trainable_weights_alone(policy, data, tmp_path) -> None:
    module = policy("clipped", lora=LoraSettings(rank=4, alpha=8))
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1)
    trainer(tmp_path, 1, saver).fit(module, data())
    state = torch.load(saver.best_model_path or next(tmp_path.glob("*.ckpt")), weights_only=True)["state_dict"]
    assert len(state) == len(weights(module)) > 0
    assert all("lora_" in name for name in state)


def test_adapter_trains_alone_and_is_merged_on_export(policy, data, tmp_path) -> None:
    module = policy("nft", lora=LoraSettings(rank=4, alpha=8))
    module.configure_model()
    frozen = {n: p.clone() for n, p in module.model.transformer.named_parameters() if not p.requires_grad}
    trainer(tmp_path, 2, ExportModel(str(tmp_path / "export"))).fit(module, data())
    for name, parameter in module.model.transformer.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name])
        elif "lora_B" in name:
            assert parameter.abs().max() > 0
    plain = load_image_model(tmp_path / "export", image_size=(32, 32))
    latents = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        adapted = module.model.eval().velocity(latents, 0.5, module.model.encode(["a red pot"]))
        merged = plain.velocity(latents, 0.5, plain.encode(["a red pot"]))
        original = load_image_model(module.model_path, image_size=(32, 32))
        base = original.velocity(latents, 0.5, original.encode(["a red pot"]))
    torch.testing.assert_close(adapted, merged, atol=1e-5, rtol=1e-5)
    assert (merged - base).abs().max() > 1e-4


def test_everything_a_user_looks_at_is_in_tensorboard(policy, data, tmp_path) -> None:
    callbacks = [PhaseTimer(peak_tflops=0.1), SampleGrids(per_category=2), TensorBoardLayout(), WeightEMA()]
    run = trainer(tmp_path, 2, *callbacks, limit_val_batches=None, val_check_interval=1, check_val_every_n_epoch=None)
    run.fit(policy("clipped"), data())
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    scalars = set(events.Tags()["scalars"])
    assert {
        "reward/mean", "reward/range", "reward/std", "category/portrait", "category/plant", "update/ratio_mean",
        "update/clip_fraction", "update/gradient_norm", "time/rollout_s", "time/reward_s", "time/update_s",
        "time/images_per_s", "time/tflops", "time/update_tflops", "time/utilisation", "val/brightness/mean",
        "val/brightness/plant",
    } <= scalars  # fmt: skip
    assert {"samples/portrait", "samples/plant"} <= set(events.Tags()["images"])
    assert len(events.Images("samples/plant")) == 2
    assert any("custom_scalars" in tag for tag in events.Tags()["tensors"])


@pytest.mark.parametrize(
    ("kind", "objective"),
    [("clipped", {"kl_weight": 0.04}), ("nft", {"reference_weight": 0.01}), ("nft", {"reference_weight": 0.0})],
)
def test_no_chart_of_tensorboards_layout_is_empty(policy, data, tmp_path, kind, objective) -> None:
    callbacks = [PhaseTimer(peak_tflops=0.1), TensorBoardLayout(), UpdateProbe(every=1, prompts=2)]
    run = trainer(tmp_path, 2, *callbacks, limit_val_batches=None, val_check_interval=1, check_val_every_n_epoch=None)
    run.fit(policy(kind, objective=objective), data())
    events = EventAccumulator(str(tmp_path)).Reload()
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    charts = {chart.title: chart.multiline.tag for section in layout.category for chart in section.chart}
    scalars = events.Tags()["scalars"]
    assert not [title for title, tags in charts.items() if not any(re.search(t, s) for t in tags for s in scalars)]
    assert not re.search(charts["seconds by phase"][0], "time/images_per_s")  # no seconds
    assert ("ratio and clipping" in charts) == (kind == "clipped")
    assert ("distance to the weights before training" in charts) == any(objective.values())


def test_test_writes_scores_and_images(policy, data, tmp_path) -> None:
    module = policy("nft", judges={"broken": Broken()}, test_members=2)
    trainer(tmp_path, 1, ImageWriter(str(tmp_path / "images"), members=1)).test(module, data(), verbose=False)
    rows = [json.loads(line) for line in (tmp_path / "test_scores.jsonl").read_text().splitlines()]
    assert [(r["id"], r["member"]) for r in rows] == [(i, m) for i in range(16, 20) for m in range(2)]
    assert all(r["scores"]["judge/broken"] == 3.0 and 1 <= r["scores"]["brightness"] <= 5 for r in rows)
    assert sorted(p.name for p in (tmp_path / "images").glob("*.png")) == [f"{i}_0.png" for i in range(16, 20)]


def test_test_draws_the_same_images_whatever_the_batch(policy, data, tmp_path) -> None:
    found = []
    for size in (1, 4):
        module = policy("nft")
        trainer(tmp_path / str(size), 1).test(module, data(eval_batch_size=size), verbose=False)
        rows = (tmp_path / str(size) / "test_scores.jsonl").read_text().splitlines()
        found.append([json.loads(r)["scores"]["brightness"] for r in rows])
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert len(set(found[0])) > 1


def test_reward_outside_its_scale_stops_the_run(policy, data, tmp_path) -> None:
    module = policy("nft", rewards={"broken": Broken()})
    batch = data().train.select([0])
    module.configure_model()
    images = torch.rand(3, 3, 32, 32)
    seven = type(batch)(ids=batch.ids, texts=("seven",), categories=batch.categories)
    with pytest.raises(ValueError, match=r"'broken' returned scores from .* 7.000"):
        module.score(toy_rollout(seven, 3, images))


def test_masked_scores_leave_the_loss_and_the_baseline(policy, data) -> None:
    module = policy("nft", rewards={"broken": Broken()})
    batch = data().train.select([0])
    nan = type(batch)(ids=batch.ids, texts=("nan",), categories=batch.categories)
    outcome = module.score(toy_rollout(nan, 3, torch.rand(3, 3, 32, 32)))
    assert outcome.scores.isnan().all()
    assert torch.equal(outcome.advantages, torch.zeros(3))


def test_run_stops_after_updates_that_are_not_finite(policy, data, tmp_path) -> None:
    module = policy("nft", max_skipped=2)
    module.configure_model()
    before = weights(module)
    original = module.objective.loss
    module.objective.loss = lambda *a, **k: (lambda loss, m: (loss * float("nan"), m))(*original(*a, **k))
    with pytest.raises(RuntimeError, match="2 updates in a row"):
        trainer(tmp_path, 10).fit(module, data())
    after = weights(module)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_skipped_update_leaves_iterations_whole_for_checkpoints(policy, data, tmp_path) -> None:
    """Steps are what ModelCheckpoint counts: one that did not count would end its multiples of two for good."""
    module = policy("nft", objective={"updates": 2})
    module.configure_model()
    original, calls = module.objective.loss, []

    def poisoned(*args, **kwargs):
        loss, metrics = original(*args, **kwargs)
        calls.append(module.iteration)
        return loss * (float("nan") if len(calls) == 1 else 1.0), metrics

    module.objective.loss = poisoned
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_top_k=-1)
    run = trainer(tmp_path, 6, saver)
    run.fit(module, data())
    assert run.global_step == 6
    assert module.iteration == 3
    assert sorted(path.stem for path in tmp_path.glob("*.ckpt")) == [f"epoch=0-step={n}" for n in (2, 4, 6)]


def test_nothing_is_drawn_in_larger_batches_than_rollouts(policy, data, tmp_path) -> None:
    module = policy("nft", rollout={"batch_size": 3, "group_size": 3})
    module.configure_model()
    sizes, velocity = [], module.model.velocity
    module.model.velocity = lambda latents, *args: sizes.append(len(latents)) or velocity(latents, *args)
    module.sampler.images(module.model, data().validation, members=2)
    assert set(sizes) == {2}  # whole prompts: 2 of at most 3 images


def test_adamw8bit_from_bitsandbytes_trains(policy, data, tmp_path) -> None:
    from functools import partial

    import bitsandbytes

    module = policy("nft", optimizer=partial(bitsandbytes.optim.AdamW8bit, lr=1e-3))
    module.configure_model()
    before = weights(module)
    run = trainer(tmp_path, 2)
    run.fit(module, data())
    states = run.optimizers[0].state
    assert any(s["state1"].dtype == torch.uint8 for s in states.values())
    assert any(not torch.equal(before[n], p) for n, p in weights(module).items())
