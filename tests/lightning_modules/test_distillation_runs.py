"""Whole distillations of a few iterations: learning, resuming, what a user sees, faults, and sampling what came out."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import ExportAdapter, ExportModel, ImageWriter, PhaseTimer, SampleGrids, TensorBoardLayout, WeightEMA
from datamodules.task_schedule import TaskRatios
from demo.sample import load, sample
from flow_rl.distillation.settings import TeacherSettings
from flow_rl.flow.guidance import Guidance
from flow_rl.flow.noise import Stream
from flow_rl.models import load_image_model
from flow_rl.models.adapters import LoraSettings
from flow_rl.models.images import to_uint8
from tests.planted import Brightness

BASE = str(Path(__file__).parents[2] / "demo" / "base")


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


VALIDATED = {"limit_val_batches": None, "val_check_interval": 1, "check_val_every_n_epoch": None}


def weights(module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in module.model.transformer.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4, alpha=8)])
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(student, tasks_data, tmp_path, lora) -> None:
    schedule = [TaskRatios(ratios={"t2i": 1, "edit": 1}), TaskRatios(start=3, ratios={"t2i": 1, "edit": 3})]

    def run(directory: Path, steps: int, checkpoint: str | None):
        module, ema = student({"num_states": 2}, lora=lora), WeightEMA(decay=0.7)
        saver = ModelCheckpoint(dirpath=directory, every_n_train_steps=2, save_last="link")
        data = tasks_data(schedule=schedule)
        trainer(directory, steps, ema, saver).fit(module, data, ckpt_path=checkpoint)
        return module, ema

    whole, whole_ema = run(tmp_path / "whole", 5, None)
    run(tmp_path / "parts", 2, None)
    resumed, resumed_ema = run(tmp_path / "parts", 5, str(tmp_path / "parts" / "last.ckpt"))
    assert resumed.iteration == whole.iteration == 5
    for expected, found in [
        (weights(whole), weights(resumed)),
        (whole_ema.shadow.state_dict(), resumed_ema.shadow.state_dict()),
    ]:
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    state = torch.load(tmp_path / "whole" / "last.ckpt", weights_only=True)["state_dict"]
    assert len(state) == len(weights(whole))  # neither teachers nor frozen weights


def test_batches_go_to_the_teacher_of_their_task_and_no_other(student, tasks_data, tmp_path) -> None:
    module, data = student(), tasks_data(seed=1)
    trainer(tmp_path, 5).fit(module, data)
    tasks = Counter(data.task_at(n) for n in range(5))
    assert set(tasks) == {"t2i", "edit"}
    # Pairs in micro-batches of 5: three prompts are 12 pairs, guided at some of them in each; two edits are 8.
    assert module.bank.calls == Counter(t2i=tasks["t2i"] * 3 * 2, edit=tasks["edit"] * 2 * 2)
    switches = sum(data.task_at(n) != data.task_at(n + 1) for n in range(5))
    assert module.bank.slot.moves == 1 + switches


def test_data_of_an_untaught_task_are_refused_before_a_model_loads(student, tasks_data, tmp_path) -> None:
    module = student(teachers={"t2i": student().teachers["t2i"]})
    with pytest.raises(ValueError, match="task 'edit'"):
        trainer(tmp_path, 1).fit(module, tasks_data())
    assert module.model is None


@pytest.mark.slow
def test_a_short_distillation_takes_the_base_to_its_teacher(student, moved, data, tmp_path) -> None:
    """The demo's base, and a guided teacher whose weights are a little off: the gap on fixed states shrinks."""
    teachers = {"t2i": TeacherSettings(path=moved(BASE, 9, 0.1), guidance=Guidance(scale=2.0))}
    module = student(
        {"num_steps": 5, "micro_batch_size": 64},
        model_path=BASE,
        teachers=teachers,
        optimizer=partial(torch.optim.AdamW, lr=3e-4, betas=(0.9, 0.99)),
    )
    gaps = []
    run = trainer(tmp_path, 16, **(VALIDATED | {"val_check_interval": 16}))
    run.validate(module, data(prompts_per_step=6), verbose=False)
    gaps.append(float(run.callback_metrics["val/t2i/gap"]))
    run.fit(module, data(prompts_per_step=6))
    gaps.append(float(run.callback_metrics["val/t2i/gap"]))
    print(f"relative velocity gap on fixed states: {gaps[0]:.3f} -> {gaps[1]:.3f}")
    assert gaps[1] < 0.7 * gaps[0]
    assert float(run.callback_metrics["val/t2i/drift"]) == 0.0


def test_everything_a_user_looks_at_is_in_tensorboard(student, tasks_data, tmp_path) -> None:
    module = student(
        rewards={"brightness": Brightness(), "other": Brightness()},
        scored={"t2i": ["brightness"], "edit": ["brightness", "other"]},
        val_guidances=[1.0, 2.0],
    )
    callbacks = [PhaseTimer(), SampleGrids(per_category=2), TensorBoardLayout(), WeightEMA()]
    data = tasks_data(schedule=[TaskRatios(ratios={"t2i": 1}), TaskRatios(start=1, ratios={"edit": 1})])
    trainer(tmp_path, 2, *callbacks, **VALIDATED).fit(module, data)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    scalars = set(events.Tags()["scalars"])
    assert {
        "loss", "t2i/loss", "t2i/gap", "t2i/cosine", "t2i/gap/sigma_0.8_1.0", "edit/gap", "update/gradient_norm",
        "time/rollout_s", "time/teacher_s", "time/update_s", "val/t2i/gap", "val/edit/gap", "val/edit/cosine",
        "val/t2i/drift", "val/t2i/gap/sigma_0.8_1.0", "val/brightness/mean", "val/guidance_2/brightness/mean",
        "val/brightness/edit/mean", "val/other/edit/mean",
    } <= scalars, sorted(scalars)  # fmt: skip
    assert "val/other/mean" not in scalars
    images = set(events.Tags()["images"])
    assert {"samples/plant", "samples/edit/plant", "samples/guidance_2/plant"} <= images
    drift = [event.value for event in events.Scalars("val/t2i/drift")]
    gap = [event.value for event in events.Scalars("val/t2i/gap")]
    assert drift == pytest.approx([0.0, max(0.0, gap[1] - gap[0])], abs=1e-6)


def test_run_stops_after_updates_that_are_not_finite(student, tasks_data, tmp_path) -> None:
    module = student(max_skipped=2)
    module.configure_model()
    before, velocity = weights(module), module.bank.velocity
    module.bank.velocity = lambda *a, **k: velocity(*a, **k) * float("nan")
    with pytest.raises(RuntimeError, match="2 updates in a row"):
        trainer(tmp_path, 10).fit(module, tasks_data())
    after = weights(module)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_export_is_evaluated_whatever_its_training_started_from(student, t2i_teacher, tasks_data, tmp_path) -> None:
    """With `initial` the student starts as a teacher; its own export is at `model_path` later on."""
    module = student(initial="t2i")
    own = module.model_path
    assert module.start_path == t2i_teacher != own
    trainer(tmp_path, 1, logger=False).predict(module, tasks_data(), return_predictions=False)
    exported = load_image_model(own, image_size=(32, 32)).transformer.state_dict()
    assert all(torch.equal(exported[name], tensor) for name, tensor in module.model.transformer.state_dict().items())


def test_a_student_is_drawn_without_its_teachers(student, tasks_data, tmp_path) -> None:
    gone = {"t2i": TeacherSettings(path="gone", guidance=Guidance(scale=2.0))}
    module = student(teachers=gone)
    trainer(tmp_path, 1, ImageWriter(str(tmp_path / "images")), logger=False).predict(
        module, tasks_data(), return_predictions=False
    )
    assert module.bank is None
    names = sorted(p.name for p in (tmp_path / "images").glob("*.png"))
    assert names == [f"{i}_0.png" for i in range(16, 20)] + [f"edit_{i}_0.png" for i in range(16, 20)]


def test_plain_diffusers_draws_the_exported_student_at_guidance_1(student, tasks_data, tmp_path) -> None:
    module = student(lora=LoraSettings(rank=4, alpha=8))
    exports = [ExportModel(str(tmp_path / "export")), ExportAdapter(str(tmp_path / "adapter"))]
    data = tasks_data()
    trainer(tmp_path, 2, *exports).fit(module, data)
    assert (tmp_path / "adapter" / "pytorch_lora_weights.safetensors").is_file()
    pipeline = load(tmp_path / "export")
    for batch in data.val_dataloader():
        one = batch.select([0])
        ours = module.draw(one, {}, 1).images
        assert ours.std() > 0.01
        noise = module.sampler.initial_noise(module.model, step=0, ids=one.ids, members=[0], stream=Stream.EVALUATION)
        source = None if one.sources is None else Image.fromarray(to_uint8(one.sources)[0])
        theirs = sample(pipeline, one.texts[0], source=source, steps=4, latents=noise).convert("RGB")
        difference = torch.from_numpy(to_uint8(ours)[0]).int() - torch.tensor(list(theirs.getdata())).view(32, 32, 3)
        assert difference.abs().max() <= 1, one.task
