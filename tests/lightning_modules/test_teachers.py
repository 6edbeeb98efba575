"""The bank of teachers: right weights, one set on the device, adapters by a switch, and what it refuses."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from flow_rl.batches import Prompts
from flow_rl.distillation.settings import TeacherSettings, check_tasks, check_teachers, student_path
from flow_rl.distillation.teachers import TeacherBank
from flow_rl.flow.guidance import Guidance
from flow_rl.models import load_image_model
from flow_rl.models.adapters import LoraSettings, merged_copy, use_adapter
from tests.expectations import does_not_raise
from tests.peak_memory import PeakMemory

TEXTS = ("a portrait of a person with red hair", "a red pot")
SIGMA = torch.tensor([0.9, 0.4])


def unguided(path: str | None = None, adapter: str | None = None) -> TeacherSettings:
    return TeacherSettings(path=path, adapter=adapter, guidance=Guidance(scale=1.0))


def latents() -> torch.Tensor:
    return torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))


def alone(path: str) -> torch.Tensor:
    """The velocity of a teacher loaded by itself."""
    model = load_image_model(path, image_size=(32, 32))
    with torch.no_grad():
        return model.velocity(latents(), SIGMA, model.encode(TEXTS))


@pytest.mark.parametrize("offload", [None, True])
def test_one_slot_plays_every_teacher_bit_for_bit(tiny_path, t2i_teacher, edit_teacher, offload) -> None:
    student = load_image_model(tiny_path, image_size=(32, 32))
    teachers = {"a": unguided(t2i_teacher), "b": unguided(edit_teacher), "base": unguided()}
    bank = TeacherBank(student, teachers, model_path=tiny_path, offload=offload)
    conditioning = student.encode(TEXTS)
    expected = {"a": alone(t2i_teacher), "b": alone(edit_teacher), "base": alone(tiny_path)}
    with torch.inference_mode():  # as a validation before training would
        bank.prefetch("b")
    for task in ("a", "b", "a", "a", "base", "b"):
        assert torch.equal(bank.velocity(task, latents(), SIGMA, conditioning, None), expected[task])
    assert bank.slot.moves == 6  # the prefetched one, then a, b, a, base, b
    assert bank.calls == {"a": 3, "b": 2, "base": 1}


def test_prefetching_brings_the_weights_and_asking_moves_nothing_more(tiny_path, t2i_teacher, edit_teacher) -> None:
    student = load_image_model(tiny_path, image_size=(32, 32))
    teachers = {"a": unguided(t2i_teacher), "b": unguided(edit_teacher)}
    bank = TeacherBank(student, teachers, model_path=tiny_path, offload=True)
    bank.prefetch("b")
    assert (bank.slot.moves, bank.slot.loaded) == (1, str(Path(edit_teacher).resolve()))
    bank.velocity("b", latents(), SIGMA, student.encode(TEXTS), None)
    bank.prefetch(None)
    bank.prefetch("unknown")
    assert bank.slot.moves == 1


def test_peak_memory_is_counted() -> None:
    held = torch.nn.Linear(4, 4, bias=False)
    with PeakMemory(held) as memory:
        one = torch.zeros(1000)
        two = one + 1
        del one, two
        torch.zeros(500)
    assert (memory.peak, memory.now) == (64 + 8000, 64)


@dataclass(frozen=True, kw_only=True)
class Routed(Prompts):
    """A batch of a task with any name."""

    route: str

    @property
    def task(self) -> str:
        return self.route


@pytest.mark.parametrize("adapter", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_memory_of_four_teachers_is_that_of_one(student, moved, tiny_path, t2i_teacher, adapters, adapter) -> None:
    """Peak of all tensors of whole iterations, but for the weights that wait on the CPU side of the offload."""

    def peak(count: int) -> int:
        if adapter:
            teachers = {f"task{i}": unguided(adapter=adapters(i)) for i in range(count)}
        else:
            paths = [t2i_teacher, *(moved(tiny_path, 20 + i) for i in range(count - 1))]
            teachers = {f"task{i}": unguided(path) for i, path in enumerate(paths)}
        module = student(teachers=teachers)
        module.configure_model()
        module.manual_backward = lambda loss: loss.backward()
        module.bank = TeacherBank(module.model, teachers, model_path=tiny_path, offload=True)
        module.bank.slot.place(torch.device("cpu"))
        with PeakMemory(module.model.transformer, module.bank.slot.transformer) as memory:
            for task in teachers:
                batch = Routed(ids=(1, 2), texts=TEXTS, categories=("a", "a"), route=task)
                module.zero_grad()
                module.accumulate_gradients(states := module.roll_out(batch), module.targets(task, states))
        assert set(module.bank.calls) == set(teachers)
        assert memory.peak > 2 * sum(
            p.nbytes for p in module.model.transformer.parameters()
        )  # student and teacher count
        return memory.peak

    one, four = peak(1), peak(4)
    print(f"peak tensor memory: one teacher {one / 2**20:.1f} MiB, four {four / 2**20:.1f} MiB")
    assert four <= 1.15 * one


def test_adapter_teachers_play_on_the_students_own_frozen_weights(student, adapters, tiny_path) -> None:
    teachers = {"t2i": unguided(adapter=adapters(5)), "edit": unguided(adapter=adapters(6))}
    module = student(teachers=teachers, lora=LoraSettings(rank=4, alpha=8))
    module.configure_model()
    bank, transformer = module.bank, module.model.transformer
    assert bank.slot is None  # no second copy
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_B.default" in name:
                parameter.normal_(std=0.05)
    conditioning, trainable = module.model.encode(TEXTS), [p.requires_grad for p in transformer.parameters()]
    with torch.no_grad():
        before = module.model.velocity(latents(), SIGMA, conditioning)
    found = {task: bank.velocity(task, latents(), SIGMA, conditioning, None) for task in teachers}
    with torch.no_grad():
        after = module.model.velocity(latents(), SIGMA, conditioning)
    assert torch.equal(before, after)
    assert trainable == [p.requires_grad for p in transformer.parameters()]
    assert not torch.allclose(found["t2i"], found["edit"], atol=1e-3)
    for task, velocity in found.items():  # against the adapter merged into weights of its own
        use_adapter(transformer, f"teacher_{task}")
        plain = load_image_model(tiny_path, image_size=(32, 32))
        plain.transformer = merged_copy(transformer)
        with torch.no_grad():
            expected = plain.velocity(latents(), SIGMA, plain.encode(TEXTS))
        torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=1e-4)


def test_guidance_acts_in_its_interval_only(tiny_path, t2i_teacher) -> None:
    student = load_image_model(tiny_path, image_size=(32, 32))
    teachers = {"t2i": TeacherSettings(path=t2i_teacher, guidance=Guidance(scale=2.0, low=0.6))}
    bank = TeacherBank(student, teachers, model_path=tiny_path)
    conditional, blank = student.encode(TEXTS), student.encode([""]).select([0, 0])
    guided = bank.velocity("t2i", latents(), SIGMA, conditional, blank)
    plain = bank.velocity("t2i", latents(), torch.tensor([0.5, 0.4]), conditional, blank)
    assert torch.allclose(guided[1], plain[1], atol=1e-6)
    cond = alone(t2i_teacher)[0]
    assert not torch.allclose(guided[0], cond, atol=1e-3)
    assert bank.calls["t2i"] == 3  # the second call guides nothing


# ----------------------------------------------------------------- refusals


def refusal(teachers: dict[str, TeacherSettings], model_path: str, **changes) -> str:
    settings = {"start_path": model_path, "num_steps": 4, "image_size": (32, 32)} | changes
    with pytest.raises(ValueError) as error:
        check_teachers(teachers, model_path=model_path, **settings)
    return str(error.value)


def edited(path: str, target: Path, file: str, **changes: object) -> str:
    """A copy of a model with one config changed."""
    shutil.copytree(path, target)
    config = json.loads((target / file).read_text())
    (target / file).write_text(json.dumps(config | changes))
    return str(target)


def test_teachers_of_the_same_base_are_accepted(tiny_path, t2i_teacher, adapters) -> None:
    teachers = {"t2i": unguided(t2i_teacher), "edit": unguided(adapter=adapters(5))}
    with does_not_raise(ValueError):
        check_teachers(teachers, model_path=tiny_path, start_path=tiny_path, num_steps=4, image_size=(32, 32))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("transformer/config.json", {"num_layers": 4}, "num_layers is 4, expected 2"),
        ("vae/config.json", {"z_dim": 16}, "z_dim is 16, expected 32"),
        ("scheduler/scheduler_config.json", {"shift": 5.0}, "steps through sigmas"),
        ("text_encoder/config.json", {"image_token_id": 3}, "image_token_id is 3"),
    ],
)
def test_other_architectures_and_schedules_are_refused(tiny_path, tmp_path, file, changes, message) -> None:
    path = edited(tiny_path, tmp_path / "other", file, **changes)
    text = refusal({"t2i": unguided(path)}, tiny_path)
    assert "model.teachers.t2i" in text
    assert message in text


def test_another_text_encoder_is_refused(tiny_path, tmp_path) -> None:
    shutil.copytree(tiny_path, tmp_path / "other")
    file = tmp_path / "other" / "text_encoder" / "model.safetensors"
    state = load_file(file)
    name = sorted(state)[0]
    save_file(state | {name: state[name] + 0.01}, file, metadata={"format": "pt"})
    assert f"other weights than that of '{tiny_path}' ({name})" in refusal(
        {"t2i": unguided(str(tmp_path / "other"))}, tiny_path
    )


def test_missing_teachers_and_adapters_are_refused(tiny_path, t2i_teacher, tmp_path) -> None:
    assert "model.teachers.t2i: No model directory" in refusal({"t2i": unguided(str(tmp_path / "no"))}, tiny_path)
    assert "No adapter at" in refusal({"t2i": unguided(adapter=str(tmp_path))}, tiny_path)
    unknown = {"blocks.0.to_q.lora_A.weight": torch.zeros(4, 192), "blocks.0.to_q.lora_B.weight": torch.zeros(192, 4)}
    save_file(unknown, tmp_path / "pytorch_lora_weights.safetensors")
    assert "adapts 'blocks.0.to_q'" in refusal({"t2i": unguided(adapter=str(tmp_path))}, tiny_path)
    key = "transformer_blocks.0.attn.to_q.lora_A.weight"
    save_file(
        {key: torch.zeros(4, 100), key.replace("_A.", "_B."): torch.zeros(192, 4)},
        tmp_path / "pytorch_lora_weights.safetensors",
    )
    assert "with 100 inputs" in refusal({"t2i": unguided(adapter=str(tmp_path))}, tiny_path)


def test_a_loss_that_is_zero_from_the_start_is_refused(tiny_path, t2i_teacher) -> None:
    assert "the loss would be 0" in refusal({"t2i": unguided(tiny_path), "edit": unguided()}, tiny_path)
    assert "the loss would be 0" in refusal({"t2i": unguided(t2i_teacher)}, tiny_path, start_path=t2i_teacher)
    guided = {"t2i": TeacherSettings(guidance=Guidance(scale=2.0))}  # learns the base's own guidance
    check_teachers(guided, model_path=tiny_path, start_path=tiny_path, num_steps=4, image_size=(32, 32))


def test_data_without_a_teacher_are_refused() -> None:
    teachers = {"t2i": unguided("a"), "other": unguided("b")}
    assert check_tasks(teachers, ("t2i",)) == ["other"]
    with pytest.raises(ValueError, match=r"task 'edit', but model\.teachers has t2i, other only"):
        check_tasks(teachers, ("t2i", "edit"))


def test_where_the_student_starts() -> None:
    teachers = {"t2i": unguided("a"), "edit": unguided(adapter="b")}
    assert student_path("base_dir", "base", teachers) == "base_dir"
    assert student_path("base_dir", "t2i", teachers) == "a"
    with pytest.raises(ValueError, match="Did you mean 't2i'"):
        student_path("base_dir", "t2", teachers)
    with pytest.raises(ValueError, match="teacher is an adapter"):
        student_path("base_dir", "edit", teachers)
    with pytest.raises(ValueError, match="teachers is empty"):
        student_path("base_dir", "base", {})


def test_guidance_below_1_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        TeacherSettings(path="a", guidance=Guidance(scale=0.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_states": 5}, "1 to 4 states"),
        ({"state_bias": 1.0}, "would be ignored"),
        ({"state_weights": (1.0, 1.0)}, "has 2 entries"),
        ({"state_weights": (0.0, 0.0, 0.0, 0.0)}, "not all 0"),
        ({"loss": "kl", "kl_noise_level": 0.0}, "without noise"),
        ({"micro_batch_size": 0}, "at least 1"),
    ],
)
def test_settings_that_train_silently_wrong_are_refused(student, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        student(settings)


@pytest.mark.parametrize("native", [False, True])
def test_unguided_teachers_are_warned_of_where_the_base_is_guided(native, student, t2i_teacher, monkeypatch) -> None:
    """Qwen-Image 2.1 is sampled without guidance, so that its students have none to learn."""
    module = student(teachers={"t2i": unguided(t2i_teacher)})
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace(task_names=("t2i",)))
    if native:
        known = SimpleNamespace(guidance=1)
        monkeypatch.setattr("flow_rl.distillation.settings.native_sampling", lambda _path: known)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        module.setup("fit")
    assert any("No teacher is guided" in str(warning.message) for warning in said) is not native
